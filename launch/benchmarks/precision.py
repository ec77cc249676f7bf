"""bench=precision: how far from fp64 a ring is as it grows, with any number of ranks in one process.

The ring executor runs unchanged, each rank a thread. Beside it runs the same ring with what peers do between hops:
each partial result and gradient is rounded to the inputs' dtype before it is merged or added, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ringattn.executors import ring
from ringattn.executors.call import Buffers, Call
from ringattn.kernels.interface import Kernel, accumulate_dtype, row_delta, settled
from ringattn.kernels.merge import merge_
from ringattn.kernels.registry import choose_kernel
from ringattn.layout import LAYOUTS
from ringattn.plan import Plan, make_plan
from ringattn.transport.simulated import simulate

from ..gang import Place
from ..oracle import Case, Inputs, Result, error, make_inputs
from ..records import circumstances
from ..settings import Parallel, require, require_one_of
from .cases import DTYPES, describe, named_case, shape_of
from .truth import Truth, one_head

__all__ = ["PrecisionBench", "RoundedPartials"]


@dataclass(kw_only=True)
class PrecisionBench:
    """Which case, which rings."""

    bench: str = "precision"
    cases: list[str] = field(default_factory=list)  # batch/q_heads:kv_heads/head_dim/seq_len/mask, the whole sequence
    rings: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    layout: str = "zigzag"
    dtype: str = "bf16"
    seed: int = 0
    record: str | None = None  # a file of JSON lines to add the results to
    parallel: Parallel = field(default_factory=lambda: Parallel(ranks=1))

    def __post_init__(self) -> None:
        for text in self.cases:
            named_case(text)
        require(min(self.rings, default=1) >= 1, "rings", self.rings, "numbers of at least 1")
        require_one_of("layout", self.layout, tuple(LAYOUTS))
        require_one_of("dtype", self.dtype, tuple(DTYPES))
        require(self.parallel.ranks == 1, "parallel.ranks", self.parallel.ranks, "1: the rings are simulated")


class RoundedPartials:
    """A kernel whose partial results leave it in the dtype of the inputs."""

    name = "rounded"
    row_delta, settled = staticmethod(row_delta), staticmethod(settled)

    def __init__(self, kernel: Kernel):
        self.kernel, self.reads_delta = kernel, kernel.reads_delta

    def refuses(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return self.kernel.refuses(q, k, v)

    def forward(self, q, k, v, segments, *, scale, running=None, out_dtype=None):
        part, part_lse = self.kernel.forward(q, k, v, segments, scale=scale, out_dtype=q.dtype)
        out, lse = running or (part.to(accumulate_dtype(q)), part_lse)
        if running is not None:
            merge_(out, lse, part, part_lse)
        return out.to(out_dtype or out.dtype), lse

    def backward(self, dout, q, k, v, out, lse, delta, segments, *, scale, dq=None, dk=None, dv=None, out_dtype=None):
        grads = self.kernel.backward(dout, q, k, v, out, lse, delta, segments, scale=scale)
        rounded = (grad.to(q.dtype).to(grad.dtype) for grad in grads)
        return tuple(
            part if total is None else total.add_(part) for part, total in zip(rounded, (dq, dk, dv), strict=True)
        )


def through_the_ring(plan: Plan, kernel: Kernel, case: Case, inputs: Inputs) -> Result:
    """Forward and backward on simulated ranks; the whole sequence."""

    def work(rank, transport):
        call = Call(plan, rank, kernel, case.head_dim**-0.5, transport, Buffers())
        q, k, v, dout = (plan.layout.shard(x, rank, 1) for x in inputs)
        out, lse = ring.forward(call, q, k, v)
        grads = ring.backward(call, dout, q, k, v, out, lse, None)
        return Result(out, *(grad.to(q.dtype) for grad in grads))

    parts = simulate(plan.ranks, work)
    return Result(*(plan.layout.unshard(shards, 1) for shards in zip(*parts, strict=True)))


def run(settings: PrecisionBench, place: Place) -> Iterator[list[dict[str, Any]]]:
    """The records of one case after the other."""
    common = circumstances(1) | {"bench": settings.bench}
    for text in settings.cases:
        case = named_case(text, DTYPES[settings.dtype])
        inputs = make_inputs(case, settings.seed, place.device)
        head = (case.batch - 1, case.kv_heads - 1)
        truth = Truth(case, inputs, *head)
        kernel = choose_kernel("auto", *inputs[:3]).kernel
        entrants = {
            f"ringattn-{kernel.name}-ring-{settings.layout}": kernel,
            f"rounded-partials-{kernel.name}": RoundedPartials(kernel),
        }
        rows: list[dict[str, Any]] = []
        for ranks in settings.rings:
            plan = make_plan(settings.layout, case.seq_len, ranks, **case.mask)
            for name, each in entrants.items():
                heads = one_head(through_the_ring(plan, each, case, inputs), *head, case.kv_heads)
                rows += [row | {"impl": name, "ranks": ranks} for row in errors(case, truth, heads)]
        yield [common | row for row in rows]
        print(f"{describe(case)}: rings of {', '.join(map(str, settings.rings))} done", flush=True)
        if place.device.type == "cuda":
            torch.cuda.empty_cache()


def errors(case: Case, truth: Truth, heads: list[Tensor]) -> Iterator[dict[str, Any]]:
    """The error of each part, in the fields of a record; nothing here was timed."""
    nothing = dict.fromkeys(("median_ms", "tflops_per_gpu", "efficiency", "peak_memory_gib"))
    for part, got, right in zip(Result._fields, heads, truth.right, strict=True):
        which = "forward" if part == "out" else "backward"
        told = {"pass": which, "part": part, "error": error(got, right, floor=0.0)}
        yield shape_of(case) | told | nothing
