"""What is right: fp64 attention over the whole sequence, and how far from it a result may be.

A distributed result may err twice as much as the same kernel makes on one rank with the same inputs: the tolerance
comes from the data, not from taste.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn import ContextParallel
from ringattn.kernels.interface import Kernel
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.segments import Segments
from ringattn.plan import make_plan

__all__ = [
    "Case",
    "Inputs",
    "Result",
    "allowed_error",
    "attend",
    "attend_across_ranks",
    "attend_on_one_rank",
    "error",
    "exact",
    "make_inputs",
]


class Case(NamedTuple):
    """One attention over a whole sequence; with a window of so many last keys, or cu_seqlens of documents."""

    seq_len: int
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    causal: bool = True
    dtype: torch.dtype = torch.float64
    window: int | None = None
    documents: tuple[int, ...] | None = None

    @property
    def mask(self) -> dict[str, Any]:
        """The mask as `make_plan` and `ContextParallel.attention` take it."""
        options: dict[str, Any] = {"causal": self.causal}
        if self.window is not None:
            options["window_size"] = (self.window - 1, 0)
        if self.documents is not None:
            options["cu_seqlens"] = self.documents
        return options


class Inputs(NamedTuple):
    """q, dout [B, S, H, D] and k, v [B, S, G, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class Result(NamedTuple):
    """out, dq [B, S, H, D] and dk, dv [B, S, G, D]."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def make_inputs(case: Case, seed: int, device: torch.device | str = "cpu") -> Inputs:
    """Random inputs of order 1, the same on every rank that has the same kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = (case.q_heads, case.kv_heads, case.kv_heads, case.q_heads)
    shapes = [(case.batch, case.seq_len, h, case.head_dim) for h in heads]
    return Inputs(*(torch.randn(shape, generator=generator, device=device).to(case.dtype) for shape in shapes))


def attend(kernel: Kernel, inputs: Inputs, segments: Segments, scale: float) -> Result:
    """One kernel, forward and backward."""
    q, k, v, dout = inputs
    out, lse = kernel.forward(q, k, v, segments, scale=scale, out_dtype=q.dtype)
    grads = kernel.backward(dout, q, k, v, out, lse, kernel.row_delta(dout, out), segments, scale=scale)
    return Result(out, *(grad.to(q.dtype) for grad in grads))


def attend_on_one_rank(kernel: Kernel, case: Case, inputs: Inputs) -> Result:
    """The whole sequence through one kernel."""
    segments = make_plan("contiguous", case.seq_len, 1, **case.mask).segments(0, 0)
    return attend(kernel, inputs, segments, case.head_dim**-0.5)


def attend_across_ranks(cp: ContextParallel, case: Case, inputs: Inputs) -> Result:
    """Shard, attend, differentiate, unshard: what a user does. Collective."""
    cu_seqlens = case.documents
    q, k, v = (cp.shard(x, cu_seqlens=cu_seqlens).requires_grad_() for x in inputs[:3])
    out = cp.attention(q, k, v, seq_len=case.seq_len, **case.mask)
    grads = torch.autograd.grad(out, (q, k, v), cp.shard(inputs.dout, cu_seqlens=cu_seqlens))
    parts = (x.detach() for x in (out, *grads))
    return Result(*(cp.unshard(part, seq_len=case.seq_len, cu_seqlens=cu_seqlens) for part in parts))


def exact(case: Case, inputs: Inputs) -> Result:
    """The oracle: fp64, eager, on the inputs as rounded to the case's dtype."""
    return attend_on_one_rank(ReferenceKernel(), case, Inputs(*(x.double() for x in inputs)))


def error(got: Tensor, expected: Tensor, floor: float = 0.1) -> float:
    """Root-mean-square difference over the root mean square of what is expected; NaN never passes a comparison.

    Inputs are of order 1, so what is expected to vanish (dq of a row with one key) is measured against `floor`.
    """
    if expected.numel() == 0:
        return 0.0
    size = expected.double().square().mean().sqrt().clamp_min(floor)
    return ((got.double() - expected.double()).square().mean().sqrt() / size).item()


def allowed_error(baseline: Tensor, expected: Tensor, factor: float = 2.0, floor: float = 0.1) -> float:
    """`factor` times the error of the same arithmetic on one rank, and the error of rounding the result once."""
    eps = torch.finfo(baseline.dtype).eps
    rounding = 8 * eps if baseline.dtype == torch.float64 else eps / 2  # in fp64 the oracle errs as much itself
    return factor * error(baseline, expected, floor) + rounding
