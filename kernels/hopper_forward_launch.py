"""From tensors and segments to launches of the Hopper forward."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .hopper_arguments import NARROWEST, described, processors
from .hopper_forward import hopper_forward_kernel
from .interface import Arrival, nothing_seen
from .launching import Constants, launch
from .segments import Segments
from .tiles import query_tiles
from .triton_arguments import strides
from .triton_launch import lower, positive, section
from .tuning import Tiling, architecture, tiling_for

__all__ = ["forward"]

ROWS = 64  # of a tile, that a warpgroup owns
REGISTERS = {2: (240, 168), 3: (160, 128)}  # by warpgroups: for each thread of theirs, and when the program starts


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    running: tuple[Tensor, Tensor] | None,
    out_dtype: torch.dtype,
    arrival: Arrival | None = None,
    margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """`Kernel.forward`; with `arrival`, of keys and values that are still on their way; on all multiprocessors but
    `margin`."""
    batch, rows, heads, d = q.shape
    groups, e = v.shape[2:]
    tiling = tiling_for("hopper forward", architecture(q.device), q.dtype, max(d, e, NARROWEST), rows)
    work = lower(query_tiles, segments, rows, tiling.rows, tiling.keys, q.device)
    if not work.busy:
        out, lse = running or nothing_seen(q, v)
        return out.to(out_dtype), lse
    if running is None:
        out = before = q.new_empty(batch, rows, heads, e, dtype=out_dtype)
        lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    else:
        before, lse = running
        out = before if before.dtype == out_dtype else torch.empty_like(before, dtype=out_dtype)
    tiles = work.busy if running and out is before else len(work.tiles)
    units, group = batch * groups, heads // groups
    side = group * section(units, (k.numel() + v.numel()) * k.element_size() // units)
    total = tiles * units * group
    flags, epoch, slot, patience, error = arrival or (None, 0, 1, 0, None)
    launch(
        hopper_forward_kernel,
        q.device,
        (min(total, max(processors(q.device) - margin, 1)), 1, 1),
        (
            *(described(x, block) for x, block in ((q, ROWS), (k, tiling.keys), (v, tiling.keys))),
            *(out, lse, before, work.tiles, work.runs, positive(scale), rows, tiles, side, total),
            *(flags, error, epoch, slot, patience),
        ),
        (strides(out), strides(lse), strides(before)),
        constants(tiling, heads, group, max(d, e), e),
        MERGE=running is not None,
        WINDOW=work.windowed,
        WAIT=arrival is not None,
    )
    return out, lse


@cache
def constants(tiling: Tiling, heads: int, group: int, width: int, e: int) -> Constants:
    """What the kernel is compiled for and that a shape and a tiling say."""
    parts = tiling.rows // ROWS
    registers, at_start = REGISTERS[parts]
    named = {
        "HEADS": heads,
        "GROUP": group,
        "E": e,
        "PARTS": parts,
        "BUFFERS": 1 if tiling.keep or width > 128 else 2,  # wider ones leave no room
        "SLOTS": tiling.stages,
        "REGISTERS": registers,
        "KEEP": tiling.keep,
        "num_warps": 4,
        "maxnreg": at_start,
    }
    return tuple(named.items())
