"""What the backward of every executor has in common: own keys cut in two, and gradients summed at their owner.

A rank differentiates its own keys in two halves. The first hides the arrival of the others' keys, the last hides the
journey of the others' gradients home:

    compute   | own, later half | others' keys        | own, earlier half   | sum
    travel    | keys come >>>>> |                     | gradients go home > |

The later half of a causal shard is the lighter one, and keys are half as many bytes as their fp32 gradients. The sum
is fp32 in a fixed order, and rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.executors.axis import within
from ringattn.executors.call import Call
from ringattn.kernels.segments import Segments

__all__ = ["Backward", "Part"]


class Part(NamedTuple):
    """Gradients dk, dv of the stretch `keys` of a shard, in fp32."""

    keys: slice
    dk: Tensor
    dv: Tensor


class Backward:
    """One rank's backward: the tensors that every launch reads, and dq as it grows."""

    def __init__(self, call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, delta):
        self.call = call
        self.dout, self.q, self.k, self.v = dout, q, k, v
        self.out, self.lse, self.delta = out, lse, delta
        self.dq: Tensor | None = None
        cut = k.shape[1] // 2 if call.schedule.halves and call.plan.ranks > 1 else 0
        self.first, self.last = (slice(cut, k.shape[1]), slice(0, cut)) if cut else (None, slice(0, k.shape[1]))
        self.own: list[Part] = []

    def differentiate(self, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """dk and dv of some keys, contiguous; adds to dq."""
        self.dq, dk, dv = self.call.kernel.backward(
            self.dout, self.q, k, v, self.out, self.lse, self.delta, segments, scale=self.call.scale, dq=self.dq
        )
        return dk.contiguous(), dv.contiguous()

    def own_keys(self, keys: slice | None) -> None:
        """Differentiates `self.first` or `self.last`."""
        if keys is None:
            return
        call = self.call
        segments = within(call.plan.segments(call.rank, call.rank), keys.start, keys.stop)
        self.own.append(Part(keys, *self.differentiate(self.k[:, keys], self.v[:, keys], segments)))

    def settle(self, parts: list[Part]) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv, once all own keys are differentiated: own gradients plus the others' parts, in that order."""
        assert self.dq is not None
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (self.k, self.v))
        for own in self.own:
            joining = [part for part in (overlap(own, part) for part in parts) if part is not None]
            add(own.keys, own.dk, [(part.keys, part.dk) for part in joining], dk[:, own.keys])
            add(own.keys, own.dv, [(part.keys, part.dv) for part in joining], dv[:, own.keys])
        return self.dq, dk, dv


def overlap(own: Part, part: Part) -> Part | None:
    """What of `part` falls on the keys of `own`."""
    start, stop = max(own.keys.start, part.keys.start), min(own.keys.stop, part.keys.stop)
    if start >= stop:
        return None
    inside = slice(start - part.keys.start, stop - part.keys.start)
    return Part(slice(start, stop), part.dk[:, inside], part.dv[:, inside])


def add(keys: slice, total: Tensor, parts: list[tuple[slice, Tensor]], result: Tensor) -> None:
    """Adds parts to `total`, the gradients of `keys`, and rounds into `result`; the last in one pass if it can."""
    last = parts.pop()[1] if parts and parts[-1][0] == keys else None
    for some, part in parts:
        total[:, some.start - keys.start : some.stop - keys.start].add_(part)
    if last is None:
        result.copy_(total)
    else:
        torch.add(total, last, out=result)
