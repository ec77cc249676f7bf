"""What executors need of a transport. Messages serve any backend; memory that all ranks reach serves one node.

Both start things that go on beside the compute, and hand back a call that makes the compute wait for them. Holding that
call keeps the tensors alive. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = ["WORDS", "Mark", "Message", "Move", "Symmetric", "Transport", "TransportError"]


class Message(NamedTuple):
    """A contiguous tensor to send to, or to fill from, the rank `peer` of the group."""

    tensor: Tensor
    peer: int


class Move(NamedTuple):
    """A tensor to fill, and one of its shape to fill it from; either may lie in another rank's memory. Their rows
    x[i] are contiguous."""

    destination: Tensor
    source: Tensor


class Mark(NamedTuple):
    """Words that show how far copies have come: they become the number of meetings when all moves before are done."""

    words: Tensor  # [n] int32, of `Symmetric.words`


WORDS = 4096  # that copies can mark


class TransportError(RuntimeError):
    """A rank did not come within the deadline; says who waited for whom."""


class Transport(Protocol):
    """Carries messages; those between two ranks arrive in the order in which they were sent."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """Starts all messages of one step. The call returned waits for them: until then tensors being sent must
        not be written, and tensors being filled not be read.

        Raises:
            TransportError: when waiting, if a peer does not answer within the deadline.
        """
        ...

    def all_gather(self, moves: Sequence[Move]) -> Callable[[], None]:
        """Every rank's `source`, equally long on all, into every rank's `destination` [ranks, ...], in rank order.
        Collective; otherwise like `exchange`."""
        ...


class Symmetric(Protocol):
    """Memory of every rank that all ranks can read and write, in regions of the same sizes on each.

    A protocol of three steps keeps it free of races and of waits without a deadline:

    1. A rank writes its own regions, then meets. Only in `meet` does a rank wait for others.
    2. It copies from and into others' regions. Copies wait for nobody.
    3. After copies with `notify`, the owners learn of them in `collect`.

    What was written before the meeting before last is no longer read by anyone: so two regions used in turn, by
    the parity of `meetings`, need no other guard. A region that others write into belongs to them from a meeting
    until `collect`.
    """

    rank: int
    meetings: int  # so far; equal on all ranks between calls
    generation: int  # how often regions have moved
    patience: int  # nanoseconds that a kernel may wait for a word
    late: Tensor  # int32 [1] on the device, zero until a kernel sets it that has waited so long

    def reserve(self, sizes: Sequence[int]) -> None:
        """Makes every region at least as long as told, in bytes. Collective; contents are lost when any grows."""
        ...

    def region(self, rank: int, index: int) -> Tensor:
        """A region of a rank's memory, uint8."""
        ...

    @property
    def words(self) -> Tensor:
        """Words of this rank that a kernel may look at while copies mark them: int32 [WORDS], zeros at first."""
        ...

    def meet(self) -> None:
        """The compute that follows waits until all ranks have come here, and then sees what they wrote before."""
        ...

    def copy(self, moves: Sequence[Move | Mark], *, notify: bool = False) -> Callable[[], None]:
        """Starts copies, after the compute so far; the call returned makes the compute wait for them. With `notify`
        their owners can `collect` them."""
        ...

    def confirm(self) -> None:
        """Later calls raise if by now, in the order of the compute, a kernel has set `late`."""
        ...

    def collect(self) -> None:
        """The compute that follows waits until every other rank's latest copies with `notify` are here."""
        ...
