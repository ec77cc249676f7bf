"""From tensors and segments to launches of the Hopper forward."""

from __future__ import annotations

from functools import cache
from math import gcd

import torch
from torch import Tensor

from .dealing import dealt_tiles
from .hopper_arguments import NARROWEST, arriving, described, processors
from .hopper_forward import hopper_forward_kernel
from .interface import Arrival, nothing_seen
from .launching import Constants, launch
from .segments import NO_WINDOW, Segments
from .triton_arguments import strides
from .triton_launch import positive, section
from .tuning import Tiling, architecture, tiling_for

__all__ = ["forward"]

ROWS = 64  # of a head, that a warpgroup owns
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
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`Kernel.forward`; with `arrival`, also of keys and values that are still on their way; on all multiprocessors but
    `margin`; written to `into`, contiguous, if given."""
    batch, rows, heads, d = q.shape
    groups, e = v.shape[2:]
    tiling = tiling_for("hopper forward", architecture(q.device), q.dtype, max(d, e, NARROWEST), rows)
    if not segments:
        out, lse = running or nothing_seen(q, v)
        return out.to(out_dtype), lse
    if running is None:
        out, lse = into or (
            q.new_empty(batch, rows, heads, e, dtype=out_dtype),
            q.new_empty(batch, heads, rows, dtype=torch.float32),
        )
        before = out
    else:
        before, lse = running
        out = before if before.dtype == out_dtype else torch.empty_like(before, dtype=out_dtype)
    units, group = batch * groups, heads // groups
    together = gcd(tiling.rows // ROWS, group)  # heads that share keys, and so may share a tile
    walked = (k, v) if arrival is None else (k, v, arrival.k, arrival.v)
    side = group * section(units, sum(x.numel() for x in walked) * k.element_size() // units)
    programs, everything = max(processors(q.device) - margin, 1), not (running and out is before)
    near = NO_WINDOW if arrival is None else arrival.slot
    shape = rows, tiling.rows // together, tiling.keys, batch * heads, side, programs, everything, near, together
    work = segments.derive((*shape, q.device), lambda s: dealt_tiles(s, *shape).to(q.device))
    launch(
        hopper_forward_kernel,
        q.device,
        (work.programs, 1, 1),
        (
            *(described(x, block) for x, block in ((q, ROWS), (k, tiling.keys), (v, tiling.keys))),
            *(out, lse, before, work.pieces, work.runs, positive(scale), rows),
            *arriving(arrival, tiling.keys),
        ),
        (strides(out), strides(lse), strides(before)),
        constants(tiling, heads, group, together, max(d, e), e),
        MERGE=running is not None,
        WINDOW=work.windowed,
        WAIT=arrival is not None,
    )
    return out, lse


@cache
def constants(tiling: Tiling, heads: int, group: int, together: int, width: int, e: int) -> Constants:
    """What the kernel is compiled for and that a shape and a tiling say."""
    parts = tiling.rows // ROWS
    registers, at_start = REGISTERS[parts]
    named = {
        "HEADS": heads,
        "GROUP": group,
        "TOGETHER": together,
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
