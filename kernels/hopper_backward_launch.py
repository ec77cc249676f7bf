"""From tensors and segments to the launch of the Hopper backward."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .dealing import queue
from .hopper_arguments import NARROWEST, Described, HopperForm, described, processors
from .hopper_backward import hopper_backward_kernel
from .hopper_prepare import PIECES, prepare_kernel
from .launching import Constants, launch
from .segments import Segments
from .tiles import Work, key_tiles, to_device
from .triton_arguments import addressable, block_width, strides
from .triton_launch import positive, section, start_sum
from .turns import Turns, turns_of

__all__ = ["backward", "begin"]

KEYS, BLOCK, ROWS = 128, 128, 64  # keys of a tile, rows of a block and of a step
PREPARED = 32  # rows of a program of `prepare_kernel`
LOG2E = 1.4426950408889634
SIDE = 8  # key/value heads that work side by side at least when sums are ordered: fewer of their tiles wait in a row


def shares_of(group: int, longest: int, blocks: int, processors: int) -> int:
    """How many programs share the query heads of a tile: two where the longest tile would take longer than all of them
    spread evenly over the multiprocessors. No more, because from zero a + b is b + a: dk and dv stay the same bits.

    Example:
        >>> shares_of(4, 16, 136 * 8, 132), shares_of(4, 64, 2080 * 8, 132), shares_of(1, 16, 136 * 8, 132)
        (2, 1, 1)
    """
    return 2 if group % 2 == 0 and longest * processors > blocks else 1


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor | None,
    segments: Segments,
    scale: float,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    deterministic: bool,
    pieces: Described | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Kernel.backward`, for bfloat16 and float16 and head dims up to 128; `pieces`, and the first dq, from
    `begin`, and then no delta.

    dk and dv are the same bits at every run; dq is with `deterministic`, which makes tiles wait for one another.
    """
    batch, rows, heads, d = q.shape
    _, keys, groups, e = v.shape
    group, units = heads // groups, batch * groups
    scale = positive(scale)
    width = max(NARROWEST, block_width(max(d, e)))
    work, longest, blocks = segments.derive((lower, keys), lambda s: lower(s, keys))
    running = dk is not None or dv is not None
    tiles = work.busy if running else work.tiles.shape[0]
    shares = 1 if running else shares_of(group, longest, blocks * units, processors(q.device))
    side = shares * side_by_side(units, (q.numel() + dout.numel()) * q.element_size() // units, deterministic)
    shape = tiles, units * shares, side, processors(q.device)
    order, runs = segments.derive((backward, keys, *shape, q.device), lambda _: placed(work, shape, q.device))
    onto = running or shares > 1
    if running:
        dk, dv = start_sum(k, dk, onto), start_sum(v, dv, onto)
    else:
        dk, dv = room(k, v, onto)
    if pieces is None:
        dq, pieces = begin(q, v, lse, delta, scale, dq)
    assert dq is not None
    cells = -(-rows // BLOCK)
    if deterministic:
        turns = segments.derive((turns_of, keys, q.device), lambda _: turns_of(work, BLOCK).to(q.device))
        counters = torch.zeros(batch * heads * cells, dtype=torch.int32, device=q.device)
    else:
        turns, counters = Turns(runs, runs), runs  # not read
    sums = [described(x, ROWS, block) for x, block in ((dq, 64), (dk, width), (dv, width))]
    launch(
        hopper_backward_kernel,
        q.device,
        (order.shape[0], 1, 1),
        (
            *(described(x, block, width) for x, block in ((q, ROWS), (k, KEYS), (v, KEYS), (dout, ROWS))),
            pieces,
            *sums, order, runs, *turns, counters, scale, scale * LOG2E, cells,
        ),
        (),
        (
            ("GROUPS", groups), ("GROUP", group), ("SHARE", group // shares), ("ADD", onto),
            ("ORDERED", deterministic), ("num_warps", 4), ("maxnreg", 128),
        ),
    )  # fmt: skip
    for total, x in zip((dq, dk, dv), sums, strict=True):
        if x.base is not total:  # a copy that could be described
            total.copy_(x.base)
    return dq, dk, dv


def room(k: Tensor, v: Tensor, zero: bool) -> tuple[Tensor, Tensor]:
    """For dk and dv; zeros are one piece of memory, since the host pays for each launch."""
    if not zero:
        dk, dv = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
        return dk, dv
    cut = k.numel()
    both = torch.zeros(cut + v.numel(), dtype=torch.float32, device=k.device)
    return both[:cut].view(k.shape), both[cut:].view(v.shape)


class Lowered(NamedTuple):
    """The tables of the backward; how many blocks of rows the longest tile walks, and all of them together."""

    work: Work
    longest: int
    blocks: int


def lower(segments: Segments, keys: int) -> Lowered:
    """In the tile that reaches past the end all blocks have a mask: its last keys are zeros, and P of a zero need not
    be finite."""
    work = key_tiles(segments, keys, KEYS, BLOCK)
    for key0, begin, end in work.tiles.tolist():
        if key0 + KEYS > keys:
            work.runs[begin:end, 3] = work.runs[begin:end, 2]
    blocks = work.blocks(BLOCK)
    return Lowered(work, int(blocks.max(initial=0)), int(blocks.sum()))


def placed(work: Work, shape: tuple[int, int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Who does what, in this order, and the runs, on the device."""
    return to_device(queue(work, BLOCK, *shape), device), to_device(work.runs, device)


@cache
def side_by_side(units: int, bytes_each: int, ordered: bool) -> int:
    """How many units, key/value heads of one sequence, run side by side: see `triton_launch.section` and SIDE.

    Example:
        >>> side_by_side(8, 40 << 20, False), side_by_side(8, 40 << 20, True), side_by_side(64, 4 << 20, True)
        (1, 8, 8)
    """
    least = section(units, bytes_each)
    if ordered:
        least = max(least, min(SIDE, units))
    return min(n for n in range(least, units + 1) if units % n == 0)


def begin(
    q: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor | None,
    scale: float,
    dq: Tensor | None = None,
    product: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Described]:
    """What all launches share: dq, zero unless given, and lse and delta [B, H, L] in pieces, [B * H, L, PIECES]; see
    `hopper_prepare.py`. With `product`, dout and out, delta is what their product is less. A fresh dq has its heads
    before its rows in memory: adding to it touches fewer pages."""
    batch, rows, heads, d = q.shape
    form = form_of_pieces(batch * heads, rows, q.dtype)
    pieces = torch.empty(form.shape, dtype=q.dtype, device=q.device)
    zeros = None
    if dq is None:
        zeros = torch.empty(batch, heads, rows, d, dtype=torch.float32, device=q.device)
        dq = zeros.transpose(1, 2)
    dout, out = (None, None) if product is None else map(addressable, product)
    launch(
        prepare_kernel,
        q.device,
        (-(-rows // PREPARED) * heads, batch, 1),
        (
            dout,
            out,
            lse.contiguous(),
            None if delta is None else delta.contiguous(),
            pieces,
            zeros,
            positive(scale),
            rows,
        ),
        (None, None) if dout is None or out is None else (strides(dout), strides(out)),
        prepared_for(heads, d, v.shape[3]),
    )
    return dq, Described(pieces, form)


@cache
def prepared_for(heads: int, d: int, e: int) -> Constants:
    """What `prepare_kernel` is compiled for."""
    named = {"HEADS": heads, "D": d, "E": e, "BLOCK": PREPARED, "BLOCK_D": block_width(d), "BLOCK_E": block_width(e)}
    return tuple(named.items())


@cache
def form_of_pieces(heads: int, rows: int, dtype: torch.dtype) -> HopperForm:
    columns = PIECES.value
    return HopperForm([heads, rows, columns], [rows * columns, columns, 1], [1, ROWS, columns], dtype)
