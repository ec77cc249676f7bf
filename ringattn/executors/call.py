"""What an executor is given for one attention call on one rank, besides the tensors."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ringattn.kernels.interface import Kernel
from ringattn.plan import Plan
from ringattn.transport.interface import Symmetric, Transport

__all__ = ["Buffers", "Call", "Executor", "Schedule", "with_room"]


class Buffers:
    """Named receive buffers that outlive a call: each grows to the largest size asked of it and is then reused."""

    def __init__(self) -> None:
        self._bytes: dict[Hashable, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.numel() for buffer in self._bytes.values())

    def clear(self) -> None:
        """Gives all of them back."""
        self._bytes.clear()

    def take(self, name: Hashable, shape: torch.Size | tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the device of `like`, valid until the name is taken again on the same stream."""
        stream = torch.cuda.current_stream(like.device).stream_id if like.is_cuda else 0
        key = (name, like.device, stream)
        size = torch.Size(shape).numel() * dtype.itemsize
        if key not in self._bytes or self._bytes[key].numel() < size:
            self._bytes[key] = torch.empty(size, dtype=torch.uint8, device=like.device)
        return self._bytes[key][:size].view(dtype).view(shape)


class Schedule(NamedTuple):
    """How finely an executor cuts its work, so that travel hides behind compute. Chosen by `ringattn.cost`; results
    depend on it only in rounding."""

    flags: bool = (
        False  # pull: one launch for all keys, that looks itself which have come; else own keys have their own
    )
    at_once: bool = False  # pull's backward: one launch for all keys, which delivers gradients
    halves: bool = True  # other backwards: own keys in two launches, while keys come and while gradients go home
    replay: bool = False  # what a call starts is recorded, and started as a whole when its tensors come again
    head_groups: int = 1  # the heads' keys come in so many groups; of gather's, two are held at a time


DEFAULT = Schedule()


@dataclass(frozen=True)
class Call:
    """One rank's part in one attention over a sequence."""

    plan: Plan
    rank: int
    kernel: Kernel
    scale: float
    transport: Transport | None  # None when there is one rank
    buffers: Buffers
    symmetric: Symmetric | None = None  # None where ranks cannot reach each other's memory
    schedule: Schedule = DEFAULT
    derived: dict[Hashable, Any] = field(default_factory=dict, compare=False)  # what an executor keeps between calls
    replays: dict[Hashable, Any] = field(default_factory=dict, compare=False)  # see `ringattn.replay`


def with_room(call: Call) -> dict[str, int]:
    """An option for a launch beside which narrow messages travel: a kernel whose programs stay until the end leaves
    them the multiprocessors that they need. Beside others there is room."""
    if call.transport is None or not getattr(call.kernel, "yields", False):
        return {}
    return {"margin": call.transport.processors}


class Executor(Protocol):
    """What every module of this folder that decides when keys are there has."""

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, running: tuple[Tensor, Tensor] | None = None, /
    ) -> tuple[Tensor, Tensor]:
        """out and lse of this rank's queries over the whole sequence; rows start from `running`, which may be written
        to."""
        ...

    def backward(
        self,
        call: Call,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        /,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv of this rank's queries, keys and values, in the dtype of these."""
        ...
