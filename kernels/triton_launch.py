"""From tensors and segments to launches of the Triton kernels.

A grid is (heads of a section, tiles, sections): see `triton_tile.locate`. Everything that follows from segments is
made once per list (`Segments.derive`); what remains for each call is a few descriptors and the launch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .segments import Segments
from .tiles import Work, key_tiles, query_tiles
from .triton_backward import key_gradients_kernel, query_gradients_kernel
from .triton_forward import forward_kernel
from .tuning import Tiling, architecture, tiling_for

__all__ = ["forward", "key_gradients", "query_gradients"]

L2_BUDGET = 32 << 20  # bytes that the heads of a section may read again and again: about half of the cache
WIDEST_STRIDE = 1 << 23  # elements from row to row: offsets inside a block are 32-bit
MOST_TILES = 65535  # the second dimension of a grid


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    running: tuple[Tensor, Tensor] | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`Kernel.forward`."""
    q, k, v = (addressable(x) for x in (q, k, v))
    batch, rows, heads, d = q.shape
    groups, e = v.shape[2:]
    tiling = tiling_for("forward", architecture(q.device), q.dtype, max(d, e), rows)
    work = lower(query_tiles, segments, rows, tiling.rows, tiling.keys, q.device)
    if running is None:
        out = before = q.new_empty(batch, rows, heads, e, dtype=out_dtype)
        lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    else:
        before, lse = running
        out = before if before.dtype == out_dtype else torch.empty_like(before, dtype=out_dtype)
    launch(
        forward_kernel,
        tiling,
        grid(work.busy if running and out is before else len(work.tiles), batch * groups, heads // groups, k, v),
        (q, k, v, describe(k, tiling, tiling.keys), describe(v, tiling, tiling.keys), out, lse, before),
        (work.tiles, work.runs, positive(scale), rows),
        (*strides(q), *strides(k), *strides(v), *strides(out), *strides(before), *strides(lse)[:2]),
        {"HEADS": heads, "GROUP": heads // groups, "D": d, "E": e, "MERGE": running is not None, "AHEAD": tiling.ahead},
    )
    return out, lse


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
) -> tuple[Tensor, Tensor]:
    """dk and dv of `Kernel.backward`."""
    dout, q, k, v = (addressable(x) for x in (dout, q, k, v))
    batch, rows, heads, d = q.shape
    _, keys, groups, e = v.shape
    tiling = tiling_for("key gradients", architecture(q.device), q.dtype, max(d, e), keys)
    work = lower(key_tiles, segments, keys, tiling.keys, tiling.rows, q.device)
    add = dk is not None or dv is not None
    dk, dv = (start_sum(x, total, add) for x, total in ((k, dk), (v, dv)))
    launch(
        key_gradients_kernel,
        tiling,
        grid(work.busy if add else len(work.tiles), batch * groups, 1, q, dout),
        (q, k, v, dout, describe(q, tiling, tiling.rows), describe(dout, tiling, tiling.rows)),
        (lse.contiguous(), delta.contiguous(), dk, dv, work.tiles, work.runs, positive(scale), rows, keys),
        (*strides(q), *strides(k), *strides(v), *strides(dout), *strides(dk), *strides(dv)),
        {"HEADS": heads, "GROUP": heads // groups, "D": d, "E": e, "ADD": add},
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
) -> Tensor:
    """dq of `Kernel.backward`."""
    dout, q, k, v = (addressable(x) for x in (dout, q, k, v))
    batch, rows, heads, d = q.shape
    groups, e = v.shape[2:]
    tiling = tiling_for("query gradients", architecture(q.device), q.dtype, max(d, e), rows)
    work = lower(query_tiles, segments, rows, tiling.rows, tiling.keys, q.device)
    add = dq is not None
    dq = start_sum(q, dq, add)
    launch(
        query_gradients_kernel,
        tiling,
        grid(work.busy if add else len(work.tiles), batch * groups, heads // groups, k, v),
        (q, k, v, dout, describe(k, tiling, tiling.keys), describe(v, tiling, tiling.keys)),
        (lse.contiguous(), delta.contiguous(), dq, work.tiles, work.runs, positive(scale), rows),
        (*strides(q), *strides(k), *strides(v), *strides(dout), *strides(dq)),
        {"HEADS": heads, "GROUP": heads // groups, "D": d, "E": e, "ADD": add},
    )
    return dq


def launch(
    kernel: Any, tiling: Tiling, size: tuple[int, int, int], tensors: tuple, work: tuple, steps: tuple, constants: dict
) -> None:
    """Starts a kernel. Integers that only say how long something is are not specialised on, strides are: blocks are
    read 16 bytes at a time where strides allow it."""
    if 0 in size:
        return
    q = tensors[0]
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        kernel[size](
            *tensors,
            *work,
            *steps,
            **constants,
            BLOCK_ROWS=tiling.rows,
            BLOCK_KEYS=tiling.keys,
            BLOCK_D=block_width(constants["D"]),
            BLOCK_E=block_width(constants["E"]),
            PRECISION=precision(q.dtype),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            enable_fp_fusion=True,
        )


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


def addressable(x: Tensor) -> Tensor:
    """x, or a contiguous copy where the kernels cannot reach it as it lies."""
    return x if x.stride(-1) == 1 and x.stride(1) < WIDEST_STRIDE else x.contiguous()


def start_sum(x: Tensor, total: Tensor | None, add: bool) -> Tensor:
    """The running sum to add gradients of x to: the one given, zeros, or memory that will be written to."""
    if total is not None:
        return total
    return (torch.zeros if add else torch.empty)(x.shape, dtype=torch.float32, device=x.device)


def strides(x: Tensor) -> list[int]:
    """Strides of the first three dimensions; 0 for one of size 1, whose own is arbitrary and would compile anew."""
    return [0 if n == 1 else stride for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]


def describe(x: Tensor, tiling: Tiling, block: int) -> TensorDescriptor | None:
    """A descriptor of x [B, L, H, D] as [B, H, L, D] for blocks of `block` rows; None where pointers are to be used."""
    unit = 16 // x.element_size()
    b, length, h = (stride or unit for stride in strides(x))
    if not tiling.tma or x.numel() == 0 or x.data_ptr() % 16 or any(stride % unit for stride in (b, length, h)):
        return None
    shape = [x.shape[0], x.shape[2], x.shape[1], x.shape[3]]
    return TensorDescriptor(x, shape, [b, h, length, 1], [1, 1, block, block_width(x.shape[3])])


def block_width(head_dim: int) -> int:
    """Columns of a block: the next power of two, no fewer than a product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are done: TF32 only where torch's own matrix products may use it."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def positive(scale: float) -> float:
    if not scale > 0:
        raise ValueError(f"got scale={scale}; the softmax takes its maximum before scaling, so scale must be positive")
    return scale
