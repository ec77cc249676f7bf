"""From tensors and segments to the launch of the Hopper backward."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_backward import gradients_kernel
from .segments import Segments
from .tiles import Work, key_tiles
from .triton_arguments import block_width, describe
from .triton_launch import grid, launch, positive, start_sum
from .turns import Turns, turns_of

__all__ = ["backward"]

KEYS, BLOCK, ROWS = 128, 128, 64  # keys of a tile, rows of a block and of a step
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    segments: Segments,
    scale: float,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Kernel.backward`, for head dims up to 128."""
    batch, rows, heads, d = q.shape
    _, keys, groups, e = v.shape
    group = heads // groups
    width = max(64, block_width(max(d, e)))
    work, shifts = segments.derive((backward, keys, q.device), lambda s: lower(s, keys, q.device))
    running = dk is not None or dv is not None
    tiles = work.busy if running else len(work.tiles)
    shares = 2 if group % 2 == 0 and not running and tiles * batch * groups < 2 * processors(q.device) else 1
    dk, dv = start_sum(k, dk, running or shares > 1), start_sum(v, dv, running or shares > 1)
    dq = start_sum(q, dq, True)
    dq_sum, dk_sum, dv_sum = (addable(x) for x in (dq, dk, dv))
    cells = -(-rows // BLOCK)
    if deterministic:
        turns = segments.derive((turns_of, keys, q.device), lambda s: turns_of(tables(s, keys), BLOCK).to(q.device))
        counters = torch.zeros(batch * heads * cells, dtype=torch.int32, device=q.device)
    else:
        turns, counters = Turns(work.runs, work.runs), work.runs  # not read
    launch(
        gradients_kernel,
        q.device,
        grid(tiles, batch * groups, shares, q, dout),
        (
            *(described(x, block, width) for x, block in ((q, ROWS), (k, KEYS), (v, KEYS), (dout, ROWS))),
            *(per_row(x, shifts) for x in (lse, delta)),
            described(dq_sum, ROWS, 64),
            *(described(x, ROWS, width) for x in (dk_sum, dv_sum)),
            work.tiles, work.runs, *turns, counters, positive(scale), keys, cells,
        ),
        (),
        {"GROUPS": groups, "GROUP": group, "SHARE": group // shares, "SHIFTS": shifts, "num_warps": 4, "maxnreg": 168},
        ADD=running or shares > 1,
        ORDERED=deterministic,
    )  # fmt: skip
    for total, described_sum in ((dq, dq_sum), (dk, dk_sum), (dv, dv_sum)):
        if described_sum is not total:
            total.copy_(described_sum)
    return dq, dk, dv


class CheckedDescriptor(TensorDescriptor):
    """One that `describe` has checked, once per shape; Triton's own checks cost as much as a tenth of a launch."""

    def __post_init__(self) -> None:
        pass


def described(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """A descriptor of x [B, L, H, D] as [B, H, L, D], in blocks of rows x width; of a copy, where x cannot have one."""
    spec = describe(x.shape, x.stride(), x.element_size(), rows) if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 else None
    if spec is None:
        x = x.contiguous()
        spec = describe(x.shape, x.stride(), x.element_size(), rows)
    if spec is None:
        raise ValueError(f"got head dim {x.shape[-1]}; rows must be a multiple of 16 bytes long")
    return CheckedDescriptor(x, spec[0], spec[1], [1, 1, rows, width], layout((1, 1, rows, width), x.dtype))


def addable(dq: Tensor) -> Tensor:
    """dq, or a copy of it that TMA can add to."""
    return dq if dq.data_ptr() % 16 == 0 and describe(dq.shape, dq.stride(), 4, ROWS) else dq.contiguous()


def lower(segments: Segments, keys: int, device: torch.device) -> tuple[Work, int]:
    """The tables of the backward, and how many copies of what there is one number per row of they need: TMA reads from
    multiples of 16 bytes only, so runs that start anywhere need copies that start at each of 4 rows."""
    work = tables(segments, keys)
    return work.to(device), 4 if (work.runs[:, 0] % 4).any() else 1


def tables(segments: Segments, keys: int) -> Work:
    """The tiles and runs, with a mask in all blocks of the tile that reaches past the end: its last keys are zeros, and
    P of a zero need not be finite."""
    work = key_tiles(segments, keys, KEYS, BLOCK)
    for key0, begin, end in work.tiles.tolist():
        if key0 + KEYS > keys:
            work.runs[begin:end, 3] = work.runs[begin:end, 2]
    return work


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def per_row(x: Tensor, shifts: int) -> TensorDescriptor:
    """A descriptor of [B * H * shifts, L] for x [B, H, L]: copies of every row of x that start at 0, 1, ..."""
    length = x.shape[-1]
    even = -length % 4
    copies = [pad(x[..., i:], (0, even + i)) for i in range(shifts)]
    x = torch.stack(copies, 2) if shifts > 1 else copies[0].contiguous()
    x = x.view(-1, length + even)
    return CheckedDescriptor(x, list(x.shape), [x.shape[1], 1], [1, ROWS], layout((1, ROWS), x.dtype))


@cache
def layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a block lies in shared memory; one number per row is not swizzled."""
    if len(block) == 2:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return gl.NVMMASharedLayout.get_default_for(list(block), TYPES[dtype])
