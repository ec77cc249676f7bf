"""What the backward of every executor has in common: own keys cut in two, and gradients summed at their owner.

A rank differentiates its own keys in two halves. The first hides the arrival of the others' keys, the last hides the
journey of the others' gradients home:

    compute   | own, later half | others' keys        | own, earlier half   | sum
    travel    | keys come >>>>> |                     | gradients go home > |

The later half of a causal shard is the lighter one, and keys are half as many bytes as their fp32 gradients. A kernel
that waits for keys and delivers gradients itself needs one launch only. The sum of dk and dv is fp32 in a fixed order,
and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ringattn.executors.axis import within
from ringattn.executors.call import Call
from ringattn.kernels.interface import Arrival, Kernel, Part, Three
from ringattn.kernels.segments import Segments

__all__ = ["Backward", "delta_of"]


class Backward:
    """One rank's backward: the tensors that every launch reads, and dq as it grows."""

    def __init__(self, call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse):
        self.call = call
        self.dout, self.q, self.k, self.v = dout, q, k, v
        self.out, self.lse = out, lse
        # What launches share, delta among it: some kernels make something of it that all of them can use.
        begin: Any = getattr(call.kernel, "begin", lambda *tensors, scale: None)
        begun = begin(dout, q, v, out, lse, dlse, scale=call.scale)
        self.delta: Any = delta_of(call.kernel, dout, out, dlse) if begun is None else None
        self.running: dict[str, Any] = begun or {}
        cut = k.shape[1] // 2 if call.schedule.halves and call.plan.ranks > 1 else 0
        self.first, self.last = (slice(cut, k.shape[1]), slice(0, cut)) if cut else (None, slice(0, k.shape[1]))
        self.own: list[Part] = []

    def differentiate(self, k: Tensor, v: Tensor, segments: Segments, **more: Any) -> tuple[Tensor, Tensor]:
        """dk and dv of some keys, contiguous; adds to dq."""
        inputs = self.dout, self.q, k, v, self.out, self.lse, self.delta, segments
        alone = self.q.dtype if self.call.plan.ranks == 1 else None  # nobody adds to these
        self.running["dq"], dk, dv = self.call.kernel.backward(
            *inputs, scale=self.call.scale, out_dtype=alone, **self.running, **more
        )
        return dk.contiguous(), dv.contiguous()

    def all_keys(self, segments: Segments, arrival: Arrival, homes: Sequence[Tensor]) -> None:
        """Differentiates own keys and the others' in one launch, which stores gradients of these at home."""
        grads = self.differentiate(self.k, self.v, segments, arrival=arrival, homes=homes)
        self.own.append(Part(slice(0, self.k.shape[1]), *grads))

    def own_keys(self, keys: slice | None) -> None:
        """Differentiates `self.first` or `self.last`."""
        if keys is None:
            return
        call = self.call
        segments, k, v = call.plan.segments(call.rank, call.rank), self.k, self.v
        if keys.stop - keys.start < k.shape[1]:
            segments, k, v = within(segments, keys.start, keys.stop), k[:, keys], v[:, keys]
        self.own.append(Part(keys, *self.differentiate(k, v, segments)))

    def settle(self, parts: list[Part], into: Three | None = None) -> Three:
        """dq, dk and dv, once all own keys are differentiated: own gradients plus the others' parts, in that order."""
        call = self.call
        return call.kernel.settled(self.running["dq"], self.own, parts, self.q.dtype, into, call.derived)


def delta_of(kernel: Kernel, dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """delta of `Kernel.backward`, [B, H, L]; dlse is the gradient of lse."""
    delta = kernel.row_delta(dout, out)
    return delta if dlse is None else delta - dlse
