"""Gradients as they leave: sums in fp32, heads before rows maybe, those of keys in halves maybe, and what other ranks
have to add to these, as contiguous tensors of the inputs' dtype.

One launch for all of it, because at short lengths the host needs longer to issue a launch for each than the GPU to run
them, and at long ones sums would go to memory and back again.
"""

# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interface import Part, Three
from .launching import Constants, launch
from .tiles import to_device
from .triton_arguments import block_width, strides

__all__ = ["settled"]

BLOCK = 32  # rows of a head that a program takes


def settled(
    dq: Tensor, own: Sequence[Part], parts: Sequence[Part], dtype: torch.dtype, into: Three | None = None,
    kept: dict[Any, Any] | None = None,
) -> Three:  # fmt: skip
    """`interface.settled`."""
    own = sorted(own, key=lambda part: part.keys.start)
    (_, dk, dv), (_, late_k, late_v) = own[0], own[-1]
    keys = own[-1].keys.stop
    shapes = dq.shape, (dk.shape[0], keys, *dk.shape[2:]), (dv.shape[0], keys, *dv.shape[2:])
    new_q, new_k, new_v = into or (torch.empty(shape, dtype=dtype, device=dq.device) for shape in shapes)
    grid, blocks, constants = work_of(*shapes)
    left_so = dk is late_k and dk.dtype == dv.dtype == dtype and dk.is_contiguous() and dv.is_contiguous()
    if not parts and into is None and left_so:
        new_k, new_v, grid = dk, dv, (blocks[0], 1, 1)
    first = parts[0] if parts else own[0]
    table = table_of(tuple(place(part, first) for part in parts), dq.device, kept) if parts else None
    tensors = dq, dk, dv, late_k, late_v, first.dk, first.dv, table, new_q, new_k, new_v
    cut = own[0].keys.stop
    numbers = *blocks, dq.shape[0], dq.shape[1], keys, cut, apart(own[0]), len(parts)
    launch(settling_kernel, dq.device, grid, (*tensors, *numbers), (strides(dq),), constants)
    return new_q, new_k, new_v


def place(part: Part, first: Part) -> tuple[int, ...]:
    """Which keys, how many there are from one sequence to the next, and how far in memory from the first part, in
    numbers."""
    far_k, far_v = part.dk.data_ptr() - first.dk.data_ptr(), part.dv.data_ptr() - first.dv.data_ptr()
    far = far_k // first.dk.element_size(), far_v // first.dv.element_size()
    return part.keys.start, part.keys.stop, apart(part), *far


def apart(part: Part) -> int:
    """How many keys lie from one sequence to the next."""
    return part.dk.stride(0) // (part.dk.shape[2] * part.dk.shape[3])


def table_of(found: tuple[tuple[int, ...], ...], device: torch.device, kept: dict[Any, Any] | None) -> Tensor:
    """Places as a table on the device."""
    table = None if kept is None else kept.get(found)
    if table is None:
        table = to_device(torch.tensor(found, dtype=torch.int64), device)
        if kept is not None:
            kept[found] = table
    return table


@lru_cache(1024)
def work_of(q: torch.Size, k: tuple, v: tuple) -> tuple[tuple[int, int, int], tuple[int, ...], Constants]:
    """The grid, programs for dq and for dk, and constants of a launch, for tensors of these shapes."""
    blocks = [-(-torch.Size(x[:3]).numel() // BLOCK) for x in (q, k, v)]
    named = {"HEADS": q[2], "GROUPS": k[2], "D": q[3], "E": v[3], "BLOCK": BLOCK}
    named |= {"BLOCK_D": block_width(q[3]), "BLOCK_E": block_width(v[3])}
    return (sum(blocks), 1, 1), tuple(blocks[:2]), tuple(named.items())


@triton.jit(do_not_specialize=["ROW_BLOCKS", "KEY_BLOCKS", "BATCH", "ROWS", "KEYS", "CUT", "APART", "PARTS"])
def settling_kernel(
    dq, dk, dv, late_k, late_v, parts_k, parts_v, table, dq_out, dk_out, dv_out,
    ROW_BLOCKS, KEY_BLOCKS, BATCH, ROWS, KEYS, CUT, APART, PARTS, dq_strides,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The first ROW_BLOCKS programs take dq [BATCH, ROWS, HEADS, D], the next KEY_BLOCKS dk, the others dv.

    dk [BATCH, CUT, GROUPS, D] are the gradients of the first CUT keys, of a sequence so many keys APART from the one
    before; late_k those of the others. Each of PARTS parts [BATCH, stop - start, GROUPS, D] is added to those of the
    keys from start on; `table` says start, stop, how many keys its sequences are apart, and how far it is from parts_k
    and parts_v; None if there are no parts.
    """
    block = tl.program_id(0)
    if block < ROW_BLOCKS:
        o_row, o_d, i_b, i_row, i_h = rows_of(block, ROWS, HEADS, BLOCK, BLOCK_D)
        p_x = dq + (i_b * dq_strides[0] + i_row * dq_strides[1] + i_h * dq_strides[2])[:, None] + o_d
        inside = (i_b < BATCH)[:, None] & (o_d < D)
        tl.store(dq_out + o_row[:, None] * D + o_d, tl.load(p_x, mask=inside).to(dq_out.dtype.element_ty), mask=inside)
    elif block < ROW_BLOCKS + KEY_BLOCKS:
        block -= ROW_BLOCKS
        add_up(dk, late_k, parts_k, table, dk_out, block, BATCH, KEYS, CUT, APART, PARTS, 3, GROUPS, D, BLOCK, BLOCK_D)
    else:
        block -= ROW_BLOCKS + KEY_BLOCKS
        add_up(dv, late_v, parts_v, table, dv_out, block, BATCH, KEYS, CUT, APART, PARTS, 4, GROUPS, E, BLOCK, BLOCK_E)


@triton.jit
def add_up(
    x, late, parts, table, out, block, BATCH, KEYS, CUT, APART, PARTS, COLUMN: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of own gradients and all parts, in this order."""
    o_row, o_d, i_b, i_key, i_h = rows_of(block, KEYS, HEADS, BLOCK, BLOCK_D)
    inside = (i_b < BATCH)[:, None] & (o_d < D)
    early = (i_key < CUT)[:, None]
    p_x = x + (((i_b * APART + i_key) * HEADS + i_h) * D)[:, None] + o_d
    p_late = late + (((i_b * (KEYS - CUT) + i_key - CUT) * HEADS + i_h) * D)[:, None] + o_d
    b_x = tl.load(p_x, mask=inside & early, other=0.0) + tl.load(p_late, mask=inside & ~early, other=0.0)
    if table is not None:
        for i in range(PARTS):
            start, stop, apart = tl.load(table + 5 * i), tl.load(table + 5 * i + 1), tl.load(table + 5 * i + 2)
            base = tl.load(table + 5 * i + COLUMN)
            p_part = parts + base + (((i_b * apart + i_key - start) * HEADS + i_h) * D)[:, None] + o_d
            b_x += tl.load(p_part, mask=inside & ((i_key >= start) & (i_key < stop))[:, None], other=0.0)
    tl.store(out + o_row[:, None] * D + o_d, b_x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rows_of(block, ROWS, HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows in the order in which they lie in the result, [BLOCK], columns, and the sequence, row and head of each."""
    o_row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return o_row, tl.arange(0, BLOCK_D)[None, :], o_row // HEADS // ROWS, o_row // HEADS % ROWS, o_row % HEADS
