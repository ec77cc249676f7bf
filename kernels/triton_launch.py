"""From tensors and segments to launches of the Triton kernels.

A grid is (heads of a section, tiles, sections): see `triton_tile.locate`. The host pays for every launch, so what
follows from segments is made once per list (`Segments.derive`), and what follows from shapes alone once per shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor

from .launching import Constants, launch
from .segments import Segments
from .tiles import Work, key_tiles, query_tiles
from .triton_arguments import addressable, block_width, strides, walked
from .triton_backward import delta_kernel, key_gradients_kernel, query_gradients_kernel
from .triton_forward import forward_kernel
from .tuning import Tiling, architecture, tiling_for

__all__ = ["forward", "key_gradients", "positive", "query_gradients", "row_delta", "section"]

L2_BUDGET = 32 << 20  # bytes that the heads of a section may read again and again: about half of the cache
MOST_TILES = 65535  # the second dimension of a grid
DELTA_ROWS = 32  # rows of a block of delta


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    running: tuple[Tensor, Tensor] | None,
    out_dtype: torch.dtype,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`Kernel.forward`."""
    q, k, v = addressable(q), addressable(k), addressable(v)
    batch, rows, heads, d = q.shape
    groups, e = v.shape[2:]
    tiling = tiling_for("forward", architecture(q.device), q.dtype, max(d, e), rows)
    work = lower(query_tiles, segments, rows, tiling.rows, tiling.keys, q.device)
    if work.windowed:
        tiling = tiling._replace(registers=None)  # a second comparison in masked blocks does not fit under the limit
    if running is None:
        out = before = q.new_empty(batch, rows, heads, e, dtype=out_dtype)
        lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    else:
        before, lse = running
        out = before if before.dtype == out_dtype else torch.empty_like(before, dtype=out_dtype)
    k_block, k_strides = walked(k, tiling, tiling.keys)
    v_block, v_strides = walked(v, tiling, tiling.keys)
    launch(
        forward_kernel,
        q.device,
        grid(work.busy if running and out is before else len(work.tiles), batch * groups, heads // groups, k, v),
        (q, k_block, v_block, out, lse, before, work.tiles, work.runs, positive(scale), rows),
        (strides(q), k_strides, v_strides, strides(out), strides(lse), strides(before)),
        constants(tiling, heads, groups, d, e),
        MERGE=running is not None,
        WINDOW=work.windowed,
        CAP=softcap,
        PRECISION=precision(q.dtype),
    )
    return out, lse


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """`Kernel.row_delta`."""
    dout, out = addressable(dout), addressable(out)
    batch, rows, heads, e = out.shape
    delta = out.new_empty(batch, heads, rows, dtype=torch.float32)
    launch(
        delta_kernel,
        out.device,
        (-(-rows // DELTA_ROWS) * heads, batch, 1),
        (dout, out, delta, rows),
        (strides(dout), strides(out)),
        (("HEADS", heads), ("E", e), ("BLOCK_ROWS", DELTA_ROWS), ("BLOCK_E", block_width(e))),
    )
    return delta


def key_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    segments: Segments,
    scale: float,
    dk: Tensor | None,
    dv: Tensor | None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """dk and dv of `Kernel.backward`."""
    dout, q, k, v = addressable(dout), addressable(q), addressable(k), addressable(v)
    batch, rows, heads, d = q.shape
    _, keys, groups, e = v.shape
    tiling = tiling_for("key gradients", architecture(q.device), q.dtype, max(d, e), keys)
    work = lower(key_tiles, segments, keys, tiling.keys, tiling.rows, q.device)
    add = dk is not None or dv is not None
    dk, dv = start_sum(k, dk, add), start_sum(v, dv, add)
    q_block, q_strides = walked(q, tiling, tiling.rows)
    dout_block, dout_strides = walked(dout, tiling, tiling.rows)
    lse, delta = lse.contiguous(), delta.contiguous()
    launch(
        key_gradients_kernel,
        q.device,
        grid(work.busy if add else len(work.tiles), batch * groups, 1, q, dout),
        (q_block, k, v, dout_block, lse, delta, dk, dv, work.tiles, work.runs, positive(scale), rows, keys),
        (q_strides, strides(k), strides(v), dout_strides, strides(dk), strides(dv)),
        constants(tiling, heads, groups, d, e),
        ADD=add,
        WINDOW=work.windowed,
        CAP=softcap,
        PRECISION=precision(q.dtype),
    )
    return dk, dv


def query_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    segments: Segments,
    scale: float,
    dq: Tensor | None,
    softcap: float = 0.0,
) -> Tensor:
    """dq of `Kernel.backward`."""
    dout, q, k, v = addressable(dout), addressable(q), addressable(k), addressable(v)
    batch, rows, heads, d = q.shape
    groups, e = v.shape[2:]
    tiling = tiling_for("query gradients", architecture(q.device), q.dtype, max(d, e), rows)
    work = lower(query_tiles, segments, rows, tiling.rows, tiling.keys, q.device)
    add = dq is not None
    dq = start_sum(q, dq, add)
    k_block, k_strides = walked(k, tiling, tiling.keys)
    v_block, v_strides = walked(v, tiling, tiling.keys)
    lse, delta = lse.contiguous(), delta.contiguous()
    launch(
        query_gradients_kernel,
        q.device,
        grid(work.busy if add else len(work.tiles), batch * groups, heads // groups, k, v),
        (q, k_block, v_block, dout, lse, delta, dq, work.tiles, work.runs, positive(scale), rows),
        (strides(q), k_strides, v_strides, strides(dout), strides(dq)),
        constants(tiling, heads, groups, d, e),
        ADD=add,
        WINDOW=work.windowed,
        CAP=softcap,
        PRECISION=precision(q.dtype),
    )
    return dq


def grid(tiles: int, units: int, programs: int, *walked: Tensor) -> tuple[int, int, int]:
    """`programs` programs for each tile and each unit, a key/value head of one sequence; `walked` are the tensors
    that every tile reads anew."""
    if tiles > MOST_TILES:
        raise ValueError(f"got {tiles} tiles along the sequence, and a grid takes {MOST_TILES}; call with fewer rows")
    if tiles * units == 0:
        return 0, 0, 0
    together = section(units, sum(x.numel() * x.element_size() for x in walked) // units)
    return together * programs, tiles, units // together


@cache
def section(units: int, bytes_each: int) -> int:
    """How many units run side by side: a divisor of their number, as many as share the L2 cache.

    Example:
        >>> section(8, 12 << 20), section(8, 40 << 20), section(6, 1 << 20)
        (2, 1, 6)
    """
    return max(n for n in range(1, units + 1) if units % n == 0 and (n == 1 or n * bytes_each <= L2_BUDGET))


def lower(
    cut: Callable[..., Work], segments: Segments, extent: int, block: int, step: int, device: torch.device
) -> Work:
    """The tables of `tiles.py` for these segments, made once and kept on the device."""
    return segments.derive((cut, extent, block, step, device), lambda s: cut(s, extent, block, step).to(device))


def start_sum(x: Tensor, total: Tensor | None, add: bool) -> Tensor:
    """The running sum to add gradients of x to: the one given, zeros, or memory that will be written to."""
    if total is not None:
        return total
    return (torch.zeros if add else torch.empty)(x.shape, dtype=torch.float32, device=x.device)


@lru_cache(1024)
def constants(tiling: Tiling, heads: int, groups: int, d: int, e: int) -> Constants:
    """What a kernel is compiled for and that a shape and a tiling say."""
    named = {
        "HEADS": heads,
        "GROUP": heads // groups,
        "D": d,
        "E": e,
        "BLOCK_ROWS": tiling.rows,
        "BLOCK_KEYS": tiling.keys,
        "BLOCK_D": block_width(d),
        "BLOCK_E": block_width(e),
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    if tiling.registers is not None:
        named["maxnreg"] = tiling.registers
    return tuple(named.items())


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are done: TF32 only where torch's own matrix products may use it."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def positive(scale: float) -> float:
    if not scale > 0:
        raise ValueError(f"got scale={scale}; the softmax takes its maximum before scaling, so scale must be positive")
    return scale
