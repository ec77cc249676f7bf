"""Gradients as they leave: from sums in fp32, heads before rows maybe, to contiguous tensors of the inputs' dtype.

One launch for dq, dk and dv, because at short lengths the host needs longer to issue three than the GPU to run them;
and torch's own copies take twice as long where the order of dimensions changes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Constants, launch
from .triton_arguments import block_width, strides

__all__ = ["rounded"]

Three = tuple[Tensor, Tensor, Tensor]
BLOCK = 32  # rows of a head that a program takes


def rounded(sums: Three, dtype: torch.dtype, into: Three | None = None) -> Three:
    """`interface.rounded`."""
    dq, dk, dv = sums
    new_q, new_k, new_v = into or (
        x.contiguous() if x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device=x.device) for x in sums
    )
    grid, numbers, constants = work_of(dq.shape, dk.shape, dv.shape, new_q is not dq, new_k is not dk, new_v is not dv)
    launch(
        rounding_kernel,
        dq.device,
        grid,
        (dq, dk, dv, new_q, new_k, new_v, *numbers),
        (strides(dq), strides(dk), strides(dv)),
        constants,
    )
    return new_q, new_k, new_v


@lru_cache(1024)
def work_of(q: torch.Size, k: torch.Size, v: torch.Size, *new: bool) -> tuple[tuple[int, int, int], tuple, Constants]:
    """The grid, numbers and constants of a launch, for tensors of these shapes, of which some are done."""
    blocks = [-(-x[:3].numel() // BLOCK) * each for x, each in zip((q, k, v), new, strict=True)]
    named = {"HEADS": q[2], "GROUPS": k[2], "D": q[3], "E": v[3], "BLOCK": BLOCK}
    named |= {"BLOCK_D": block_width(q[3]), "BLOCK_E": block_width(v[3])}
    return (sum(blocks), 1, 1), (q[0], q[1], k[1], *blocks[:2]), tuple(named.items())


@triton.jit(do_not_specialize=["BATCH", "ROWS", "KEYS", "ROW_BLOCKS", "KEY_BLOCKS"])
def rounding_kernel(
    dq, dk, dv, dq_out, dk_out, dv_out, BATCH, ROWS, KEYS, ROW_BLOCKS, KEY_BLOCKS, dq_strides, dk_strides, dv_strides,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The first ROW_BLOCKS programs take dq, the next KEY_BLOCKS dk, the others dv."""
    block = tl.program_id(0)
    if block < ROW_BLOCKS:
        round_block(dq, dq_out, dq_strides, block, BATCH, ROWS, HEADS, D, BLOCK, BLOCK_D)
    elif block < ROW_BLOCKS + KEY_BLOCKS:
        round_block(dk, dk_out, dk_strides, block - ROW_BLOCKS, BATCH, KEYS, GROUPS, D, BLOCK, BLOCK_D)
    else:
        round_block(dv, dv_out, dv_strides, block - ROW_BLOCKS - KEY_BLOCKS, BATCH, KEYS, GROUPS, E, BLOCK, BLOCK_E)


@triton.jit
def round_block(
    x, out, x_strides, block, BATCH, ROWS,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of x [BATCH, ROWS, HEADS, D], in the order in which they lie in the result."""
    o_row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    i_h, i_row, i_b = o_row % HEADS, o_row // HEADS % ROWS, o_row // HEADS // ROWS
    p_x = x + (i_b * x_strides[0] + i_row * x_strides[1] + i_h * x_strides[2])[:, None] + o_d
    inside = (i_b < BATCH)[:, None] & (o_d < D)
    tl.store(out + o_row[:, None] * D + o_d, tl.load(p_x, mask=inside).to(out.dtype.element_ty), mask=inside)
