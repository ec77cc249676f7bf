"""What executors need of a transport: messages between the ranks of one group, in flight while they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = ["Message", "Transport", "TransportError"]


class Message(NamedTuple):
    """A contiguous tensor to send to, or to fill from, the rank `peer` of the group."""

    tensor: Tensor
    peer: int


class TransportError(RuntimeError):
    """A message did not come within its deadline; says who waited for whom."""


class Transport(Protocol):
    """Carries messages; those between two ranks arrive in the order in which they were sent."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """Starts all messages of one step. The call returned waits for them: until then tensors being sent must
        not be written, and tensors being filled not be read.

        Raises:
            TransportError: when waiting, if a peer does not answer within the deadline.
        """
        ...
