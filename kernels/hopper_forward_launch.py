"""From tensors and segments to launches of the Hopper forward."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_forward import forward_kernel
from .segments import Segments
from .tiles import query_tiles
from .triton_arguments import block_width, describe, strides
from .triton_launch import launch, lower, positive, section

OPTIONS = dict(TURNS=True, EMULATE=0, PIN=True, QREG=False)
PARTS, KEYS, SLOTS, REGISTERS, MAXNREG = 2, 128, 3, 240, 168
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ROWS = 64


def forward(q, k, v, segments: Segments, scale, running, out_dtype, arrival=None):
    batch, rows, heads, d = q.shape
    groups, e = v.shape[2:]
    work = lower(query_tiles, segments, rows, ROWS * PARTS, KEYS, q.device)
    if running is None:
        out = before = q.new_empty(batch, rows, heads, e, dtype=out_dtype)
        lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    else:
        before, lse = running
        out = before if before.dtype == out_dtype else torch.empty_like(before, dtype=out_dtype)
    tiles = work.busy if running and out is before else len(work.tiles)
    units = batch * groups
    side = section(units, (k.numel() + v.numel()) * 2 // units) * (heads // groups)
    total = tiles * units * (heads // groups)
    launch(
        forward_kernel,
        q.device,
        (min(total, processors(q.device)), 1, 1),
        (described(q, ROWS), described(k, KEYS), described(v, KEYS), out, lse, before, work.tiles, work.runs, positive(scale), rows, tiles, side, total),
        (strides(out), strides(lse), strides(before)),
        dict(HEADS=heads, GROUP=heads // groups, E=e, SLOTS=SLOTS, PARTS=PARTS, REGISTERS=REGISTERS, num_warps=4, maxnreg=MAXNREG),
        MERGE=running is not None, WINDOW=work.windowed, **OPTIONS,
    )
    return out, lse


class CheckedDescriptor(TensorDescriptor):
    def __post_init__(self):
        pass


def described(x: Tensor, rows: int):
    spec = describe(x.shape, x.stride(), x.element_size(), rows) if x.data_ptr() % 16 == 0 and x.stride(-1) == 1 else None
    if spec is None:
        x = x.contiguous()
        spec = describe(x.shape, x.stride(), x.element_size(), rows)
        assert spec is not None
    shape, step, _ = spec
    width = max(64, block_width(x.shape[-1]))
    return CheckedDescriptor(x, shape, step, [1, 1, rows, width], layout(rows, width, x.dtype))


@cache
def layout(rows, width, dtype):
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], TYPES[dtype])


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
