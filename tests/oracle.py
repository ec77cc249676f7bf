"""What is right: fp64 attention over the whole sequence, and how far a result may be from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.kernels.interface import Kernel, row_delta
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.segments import Segments
from ringattn.plan import make_plan


class Case(NamedTuple):
    """One attention over a whole sequence."""

    seq_len: int
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    causal: bool = True
    dtype: torch.dtype = torch.float64


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class Result(NamedTuple):
    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def make_inputs(case: Case, seed: int, device: str = "cpu") -> Inputs:
    """The same random inputs on every rank."""
    generator = torch.Generator().manual_seed(seed)
    heads = (case.q_heads, case.kv_heads, case.kv_heads, case.q_heads)
    return Inputs(
        *(
            torch.randn(case.batch, case.seq_len, h, case.head_dim, generator=generator, dtype=torch.float64).to(
                device, case.dtype
            )
            for h in heads
        )
    )


def one_rank(kernel: Kernel, case: Case, inputs: Inputs) -> Result:
    """The whole sequence through one kernel."""
    segments = make_plan("contiguous", case.seq_len, 1, causal=case.causal).segments(0, 0)
    return run_kernel(kernel, inputs, segments, case.head_dim**-0.5)


def run_kernel(kernel: Kernel, inputs: Inputs, segments: Segments, scale: float) -> Result:
    q, k, v, dout = inputs
    out, lse = kernel.forward(q, k, v, segments, scale=scale, out_dtype=q.dtype)
    grads = kernel.backward(dout, q, k, v, out, lse, row_delta(dout, out), segments, scale=scale)
    return Result(out, *(grad.to(q.dtype) for grad in grads))


def exact(case: Case, inputs: Inputs) -> Result:
    """The oracle: fp64, eager, the inputs as rounded to the case's dtype."""
    return one_rank(ReferenceKernel(), case, Inputs(*(x.double() for x in inputs)))


def error(got: Tensor, expected: Tensor) -> float:
    """Root-mean-square difference over the root mean square of what is expected; NaN never passes a comparison.

    Inputs are of order 1, so what is expected to vanish (dq of a row with one key) is measured against 0.1."""
    if expected.numel() == 0:
        return 0.0
    size = expected.double().square().mean().sqrt().clamp_min(0.1)
    return ((got.double() - expected.double()).square().mean().sqrt() / size).item()


def assert_close(got: Result, expected: Result, baseline: Result, factor: float = 2.0) -> None:
    """Every part of `got` is at most `factor` times as far from the oracle as the same arithmetic on one rank."""
    for name, x, right, base in zip(Result._fields, got, expected, baseline, strict=True):
        eps = torch.finfo(base.dtype).eps * (8 if base.dtype == torch.float64 else 1)  # the oracle is in fp64 itself
        allowed = factor * error(base, right) + eps
        assert error(x, right) <= allowed, f"{name}: error {error(x, right):.2e}, allowed {allowed:.2e}"
