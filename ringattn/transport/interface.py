"""What executors need of a transport. Messages serve any backend; memory that all ranks reach serves one node.

Both start things that go on beside the compute. `Transport` hands back a call that makes the compute wait for them and
keeps their tensors alive; for `Symmetric`, `finish` does both. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = [
    "ROWS",
    "WORDS",
    "Mark",
    "Message",
    "Move",
    "Put",
    "Step",
    "Symmetric",
    "Transport",
    "TransportError",
]


class Message(NamedTuple):
    """A contiguous tensor to send to, or to fill from, the rank `peer` of the group."""

    tensor: Tensor
    peer: int


class Move(NamedTuple):
    """A tensor to fill from the parts of all ranks, and this rank's part."""

    destination: Tensor
    source: Tensor


class Put(NamedTuple):
    """A tensor to fill, in some rank's memory, and what with: a part of one of the tensors that are put, by its number.
    Rows x[i] of both are contiguous. What is put changes from call to call, where it goes does not."""

    destination: Tensor
    number: int
    part: tuple[int | slice, ...]


class Mark(NamedTuple):
    """Words of some rank that show how far this one has come: they become the number of calls."""

    words: Tensor  # [n] int32, of `Symmetric.words`


Step = Put | Mark
ROWS, WORDS = 3, 2048  # of each rank: rows of words, and words in a row


class TransportError(RuntimeError):
    """A rank did not come within the deadline; says who waited for whom."""


class Transport(Protocol):
    """Carries messages; those between two ranks arrive in the order in which they were sent."""

    processors: int  # multiprocessors that narrow messages need for themselves while they are under way

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], *, narrow: bool = False
    ) -> Callable[[], None]:
        """Starts all messages of one step, on few multiprocessors if they are narrow. The call returned waits for
        them: until then tensors being sent must not be written, and tensors being filled not be read.

        Raises:
            TransportError: when waiting, if a peer does not answer within the deadline.
        """
        ...

    def all_gather(self, moves: Sequence[Move]) -> Callable[[], None]:
        """Every rank's `source`, equally long on all, into every rank's `destination` [ranks, ...], in rank order.
        Collective; otherwise like `exchange`."""
        ...


class Symmetric(Protocol):
    """Memory of every rank that all ranks can write to: regions of the same sizes on each, and words.

    In every call a rank

    1. begins,
    2. copies its tensors into the others' regions, and
    3. hears from all others, in some row of its words, that they have come as far as it wants them to be.

    With each of the first two it may mark words of theirs.

    Only in 3 does a rank wait for others. Who has heard from all in call n knows that all have begun it, and so have
    read all that came in call n - 1: in call n + 1 it may write where it wrote in that one. So two regions used in
    turn, by the parity of `calls`, need no other guard. A third region, for what is put in answer to what was heard in
    the same call, needs none either.
    """

    rank: int
    calls: int  # so far; equal on all ranks between calls
    count: Tensor  # int32 [1] on the device: the call that the compute has come to
    generation: int  # how often regions have moved
    patience: int  # nanoseconds that a kernel may wait for a word
    late: Tensor  # int32 [1] on the device, zero until someone sets it who has waited so long

    def reserve(self, sizes: Sequence[int]) -> None:
        """Makes every region at least as long as told, in bytes. Collective; contents are lost when any grows."""
        ...

    def region(self, rank: int, index: int) -> Tensor:
        """A region of a rank's memory, uint8."""
        ...

    def words(self, rank: int) -> Tensor:
        """Words of a rank, int32 [ROWS, WORDS], zeros at first."""
        ...

    def begin(self, marks: Sequence[Mark] = ()) -> None:
        """Counts a call, to which belongs what is computed and copied from now on, and marks words that say so."""
        ...

    def mark(self, marks: Sequence[Mark]) -> None:
        """Marks words once the compute so far is done, and what it has stored in regions is there."""
        ...

    def copy(self, puts: Sequence[Step], tensors: Sequence[Tensor] = ()) -> None:
        """Starts to put parts of some tensors, as the compute so far has left them, where they belong. Words among them
        are marked when all that was put before is there."""
        ...

    def hear(self, row: int, poison: Tensor) -> None:
        """The compute that follows waits until every other rank has marked its word in a row: the one with its number.
        If one has not within the deadline, `poison` becomes NaN, `late` is set, and a later call raises."""
        ...

    def finish(self) -> None:
        """The compute that follows waits until what was put has left this rank. Until then it must not be overwritten
        or given back."""
        ...
