"""Holds what `launching.launch` keeps compiled kernels under against Triton's own choice of variants: wherever it would
start a kernel as it was bound before, Triton must bind to the same one.

    python tests/aot/variants.py 300          # rounds of random tensors; prints how many launches, and how many kept

Nothing is compiled and nothing launched. Which release of Triton chooses is a matter of PYTHONPATH.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver, jit

from ringattn.kernels import (
    hopper_backward_launch,
    hopper_forward_launch,
    launching,
    triton_launch,
    triton_settling,
)
from ringattn.kernels.interface import Arrival, Part
from ringattn.kernels.segments import NO_WINDOW, Segment, Segments
from tests.aot.report import NamedTarget


class Asked(dict):
    """Keeps nothing, and remembers what was asked for last."""

    key: Any = None

    def get(self, key: Any, default: Any = None) -> None:
        self.key = key


class Variants:
    """Which variant Triton chose for what we would keep it under."""

    def __init__(self) -> None:
        self.asked, self.chosen, self.again = Asked(), {}, 0

    def bind(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        """Takes the place of `JITFunction.run`."""
        _, keys, _, _, binder = kernel.device_caches[0]
        _, specialization, options = binder(*arguments, **named, debug=False, instrumentation_mode="")
        variant = kernel.fn, jit.compute_cache_key(keys, specialization, options)
        self.again += self.asked.key in self.chosen
        assert self.chosen.setdefault(self.asked.key, variant) == variant, f"two variants under {self.asked.key}"


def tensor(draw: random.Random, batch: int, rows: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """One that begins and lies somehow, most often as one would expect."""
    more_heads, more_columns, first = (draw.choice([0] * 20 + odd) for odd in ([2], [8, 1], [8, 1]))
    shape = batch, rows, heads + more_heads, dim + more_columns
    memory = torch.empty(torch.Size(shape).numel() + first, dtype=dtype)
    x = memory[first:].view(shape)[:, :, :heads, :dim]
    return x.transpose(1, 2).contiguous().transpose(1, 2) if draw.random() < 0.05 else x


def attend(draw: random.Random) -> None:
    """Every kernel, forward and backward, from nothing and onto what is there."""
    batch, rows, dim = draw.choice([1, 1, 2]), draw.choice([1, 16, 17]), draw.choice([64, 64, 72])
    groups, dtype = draw.choice([1, 2]), draw.choice([torch.bfloat16] * 3 + [torch.float16])
    heads, single = groups * draw.choice([1, 2]), torch.float32

    def of(heads: int, dtype: torch.dtype) -> Tensor:
        return tensor(draw, batch, rows, heads, dim, dtype)

    q, dout, k, v = of(heads, dtype), of(heads, dtype), of(groups, dtype), of(groups, dtype)
    lse, delta = torch.empty(2, batch, heads, rows)
    segments, scale = Segments([Segment(0, rows, 0, rows, 0, draw.choice([NO_WINDOW, 9]))]), draw.choice([0.1, 1, 1.0])
    flags, error = torch.empty(2, groups, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    arrival = Arrival(k, v, flags, error, rows, draw.choice([1, 1 << 40]), error)
    for out_dtype in (dtype, single):
        for running in (None, (of(heads, single), lse)):
            triton_launch.forward(q, k, v, segments, scale, running, out_dtype)
            hopper_forward_launch.forward(
                q, k, v, segments, scale, running, out_dtype, draw.choice([None, arrival]), draw.choice([0, 4])
            )
    triton_launch.row_delta(dout, of(heads, dtype))
    sums = of(heads, single), of(groups, single), of(groups, single)
    for dq, dk, dv in ((None, None, None), sums):
        triton_launch.key_gradients(dout, q, k, v, lse, delta, segments, scale, dk, dv)
        triton_launch.query_gradients(dout, q, k, v, lse, delta, segments, scale, dq)
        ordered = draw.choice([True, False])
        hopper_backward_launch.backward(dout, q, k, v, lse, delta, segments, scale, dq, dk, dv, ordered)
    own = Part(slice(0, rows), *sums[1:])
    triton_settling.settled(sums[0], [own], draw.choice([[], [own]]), dtype)


def main(rounds: str) -> None:
    variants, draw = Variants(), random.Random(0)

    def bind(self, *arguments, **named):
        variants.bind(self, *arguments, **named)

    jit.JITFunction.run = bind
    driver.set_active(NamedTarget(90))  # pyright: ignore[reportArgumentType]
    triton_launch.architecture = hopper_forward_launch.architecture = lambda device: "sm_90"
    launching.kept = variants.asked
    for _ in range(int(rounds)):
        attend(draw)
    print(len(variants.chosen) + variants.again, "launches,", variants.again, "as they were bound before")


if __name__ == "__main__":
    main(*sys.argv[1:])
