"""From tensors and segments to the launch of the Hopper backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import hopper_backward, hopper_walk
from .dealing import queue
from .hopper import SOURCES, WIDEST
from .hopper_arguments import NARROWEST, Described, HopperForm, arriving, described, processors
from .hopper_prepare import PIECES, prepare_kernel
from .hopper_tile import LOG2E
from .interface import Arrival
from .launching import Constants, launch
from .segments import Segments
from .tiles import Work, key_tiles, to_device
from .triton_arguments import addressable, block_width, strides
from .triton_launch import positive, section
from .turns import Turns, turns_of

__all__ = ["backward", "begin"]

# Keys of a tile, rows of a block and of a step, as the kernel has them.
KEYS, BLOCK, ROWS = (size.value for size in (hopper_backward.KEYS, hopper_walk.BLOCK, hopper_walk.ROWS))
PREPARED = 32  # rows of a program of `prepare_kernel`
BEGINNING = 1.2  # what a program takes besides its blocks, in blocks of one head
PATIENCE = 7  # when sums are ordered, so many times the tiles of a head at work are at most the blocks that one walks


def shares_of(group: int, longest: int, blocks: int, processors: int) -> int:
    """How many programs share the query heads of a tile: two where the longest tile would take longer than all of them
    spread evenly over the multiprocessors. No more, because they add one after the other, and four were slower.

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
    out_dtype: torch.dtype | None = None,
    pieces: Described | None = None,
    arrival: Arrival | None = None,
    homes: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """`Kernel.backward`, for bfloat16 and float16 and head dims up to 128; `pieces`, and the first dq, from
    `begin`, and then no delta. With `arrival` and `homes` see `HopperKernel.backward`.

    dk and dv are the same bits at every run; dq is with `deterministic`, which makes tiles wait for one another.
    """
    batch, rows, heads, d = q.shape
    _, own, groups, e = v.shape
    keys = own if arrival is None else arrival.slot + arrival.k.shape[1]
    group, units = heads // groups, batch * groups
    scale = positive(scale)
    width = max(NARROWEST, block_width(max(d, e)))
    far = None if arrival is None else (arrival.slot, own)
    work, longest, blocks = segments.derive((lower, keys, far), lambda s: lower(s, keys, far))
    running = dk is not None or dv is not None
    tiles = work.busy if running else work.tiles.shape[0]
    shares = 1 if running else shares_of(group, longest, blocks * units, processors(q.device))
    least = patience(longest * group, width, processors(q.device)) if deterministic else 1
    reread = min(rows, longest * BLOCK) * group * ((d + e) * q.element_size() + 4 * d)  # bytes of q, dout and dq
    side = shares * side_by_side(units, reread, least)
    shape = tiles, units * shares, side, processors(q.device)
    flags = None if arrival is None else (arrival.slot, arrival.flags.shape[1], batch, groups)
    order, runs, *turns = segments.derive(
        (backward, keys, *shape, flags, deterministic, q.device),
        lambda _: placed(work, shape, shares, group // shares, flags, deterministic, q.device),
    )
    where = segments.derive((places, rows, q.device), lambda _: places(rows, q.device))
    if pieces is None:
        dq, pieces = begin(q, v, lse, delta, scale, dq)
    assert dq is not None
    cells = -(-rows // BLOCK)
    counts = -(-batch * heads * cells // 4) * 4 * deterministic, order.shape[0] * (shares > 1)  # both at 16 bytes
    counters, shared = torch.zeros(sum(counts), dtype=torch.int32, device=q.device).split(counts)
    dtype = torch.float32 if running or shares > 1 or out_dtype is None else out_dtype
    if arrival is not None:
        assert not running
        homes = q.new_empty(2, batch, own, groups, d, dtype=dtype), *homes
        dk, dv = homes[0]
    fresh = q.new_zeros if running else q.new_empty
    dk, dv = (
        fresh(batch, own, groups, columns, dtype=dtype) if total is None else total
        for columns, total in ((d, dk), (e, dv))
    )
    sums = [described(x, ROWS, block) for x, block in ((dq, 64), (dk, width), (dv, width))]
    launch(
        hopper_backward.hopper_backward_kernel,
        q.device,
        (order.shape[0], 1, 1),
        (
            *(described(x, block, width) for x, block in ((q, ROWS), (k, KEYS), (v, KEYS), (dout, ROWS))),
            pieces, where, Described(runs, form_of_lines(*runs.shape)),
            *sums, order, runs, *turns, counters, scale, scale * LOG2E.value, cells,
            *arriving(arrival, KEYS, width), *at_home(homes, width), shared,
        ),
        (),
        (
            ("GROUPS", groups), ("GROUP", group), ("SHARE", group // shares), ("ADD", running),
            ("ORDERED", deterministic), ("WAIT", arrival is not None), ("num_warps", 4), ("maxnreg", 128),
        ),
    )  # fmt: skip
    for total, x in zip((dq, dk, dv), sums, strict=True):
        if x.base is not total:  # a copy that could be described
            total.copy_(x.base)
    return dq, dk, dv


class Lowered(NamedTuple):
    """The tables of the backward; how many blocks of rows the longest tile walks, and all of them together."""

    work: Work
    longest: int
    blocks: int


def lower(segments: Segments, keys: int, far: tuple[int, int] | None = None) -> Lowered:
    """In the tile that reaches past the end no block counts as seen whole, so that those keys have a mask which are not
    there: they are zeros, and P of a zero need not be finite. `far`: keys are in slots so long, and so many are in the
    first; tiles behind these, and those of other slots in which nothing is seen, are left out."""
    work = key_tiles(segments, keys, KEYS, BLOCK)
    for key0, begin, end in work.tiles.tolist():
        if key0 + KEYS > keys:
            work.runs[begin:end, 3] = work.runs[begin:end, 2]
    if far is not None:
        slot, own = far
        first, seen = work.tiles[:, 0], torch.arange(len(work.tiles)) < work.busy
        work = work._replace(tiles=work.tiles[(first < own) | (first >= slot) & seen])
    blocks = work.blocks(BLOCK)
    return Lowered(work, int(blocks.max(initial=0)), int(blocks.sum()))


def at_home(homes: Sequence[Tensor], width: int) -> list[Described | None]:
    """What a kernel is told of where gradients of each source's keys belong, own ones first; where nothing is seen, the
    same as of own ones."""
    assert all(x.is_contiguous() and x.dtype == torch.float32 for x in homes)  # stores do not reach a copy
    told = [described((x if x.numel() else homes[0]).flatten(0, 1), ROWS, width) for x in homes]
    return [*told, *[None] * (1 + SOURCES - len(told))]


class Placed(NamedTuple):
    """Tables on the device: who does what, in this order; the runs; turns, if there are any."""

    order: Tensor
    runs: Tensor
    visits: Tensor
    turns: Tensor


def placed(
    work: Work,
    shape: tuple[int, int, int, int],
    shares: int,
    share: int,
    flags: tuple[int, int, int, int] | None,
    ordered: bool,
    device: torch.device,
) -> Placed:
    """What a launch reads, of programs that take `share` heads each, `shares` of them a tile. `flags`: the slot, flags
    of a source, sequences and key/value heads, where keys are on their way."""
    if flags is None:
        queued = queue(work, BLOCK, *shape, BEGINNING / share)
    else:
        slot, each, batch, groups = flags
        queued = queue(work, BLOCK, *shape, BEGINNING / share, slot)
        queued.pieces[:, 0] = by_flag(each, batch, groups, shares)[queued.pieces[:, 0].long()]
    runs = to_device(work.runs, device)
    turns = Turns(runs, runs)  # not read
    if ordered:
        turns = turns_of(work._replace(tiles=work.tiles[queued.tiles]), BLOCK).to(device)
    return Placed(to_device(queued.pieces, device), runs, *turns)


def by_flag(flags: int, batch: int, groups: int, shares: int) -> Tensor:
    """Programs of a tile, counted through sequences and heads, one flag's after the other's: of all sequences.

    Example:
        >>> by_flag(2, 2, 2, 1).tolist()
        [0, 2, 1, 3]
    """
    units = torch.arange(batch * groups * shares, dtype=torch.int32)
    return units.view(batch, flags, -1).transpose(0, 1).reshape(-1)


def patience(walked: int, width: int, processors: int) -> int:
    """How many key/value heads work side by side at least when sums are ordered. Their tiles wait in a row, each for
    the time that it takes to pass on a turn: a small part of what a tile takes whose heads walk so many blocks.

    Example (causal, 32:8 heads: 8192 and 32768 rows, head dim 128; 16:16 heads: 16384 rows, head dim 64):
        >>> patience(64 * 4, 128, 132), patience(256 * 4, 128, 132), patience(128, 64, 132)
        (4, 1, 15)
    """
    return -(-PATIENCE * processors * WIDEST // (max(walked, 1) * width))


@cache
def side_by_side(units: int, bytes_each: int, least: int) -> int:
    """How many units, key/value heads of one sequence, run side by side: a divisor of their number, as many as share
    the L2 cache (`triton_launch.section`) or `least`.

    Example:
        >>> side_by_side(8, 40 << 20, 1), side_by_side(8, 40 << 20, 3), side_by_side(8, 4 << 20, 99)
        (1, 4, 8)
    """
    least = max(section(units, bytes_each), min(least, units))
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
    """What all launches share: dq, zero unless given, and lse and delta [B, H, L] in pieces, [B * H, L, PIECES] and
    then NaN for as many heads as share keys; see `hopper_prepare.py`. With `product`, dout and out, delta is what their
    product is less. A fresh dq has its heads before its rows in memory: adding to it touches fewer pages."""
    batch, rows, heads, d = q.shape
    lost = heads // v.shape[2]
    form = form_of_pieces(batch * heads + lost, rows, q.dtype)
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
        prepared_for(heads, lost, d, v.shape[3]),
    )
    return dq, Described(pieces, form)


@cache
def prepared_for(heads: int, lost: int, d: int, e: int) -> Constants:
    """What `prepare_kernel` is compiled for."""
    named = {"HEADS": heads, "LOST": lost, "D": d, "E": e}
    named |= {"BLOCK": PREPARED, "BLOCK_D": block_width(d), "BLOCK_E": block_width(e)}
    return tuple(named.items())


def places(rows: int, device: torch.device) -> Described:
    """Four lines for each step of a run of so many rows, one for each answer of `hopper_walk.masks_at`: for the first
    and for the second half of the keys the row where the step begins where a mask is needed, -ROWS where none is. TMA
    copies no fewer than 16 bytes.

    Example:
        >>> places(65, torch.device("cpu")).base[:, :2].tolist()
        [[-64, -64], [0, -64], [-64, 0], [0, 0], [-64, -64], [64, -64], [-64, 64], [64, 64]]
    """
    row = torch.arange(0, rows // ROWS + 1, dtype=torch.int32) * ROWS
    none = torch.full_like(row, -ROWS)
    halves = torch.stack((none, none, row, none, none, row, row, row), 1).view(-1, 2)
    lines = torch.cat((halves, torch.zeros_like(halves)), 1)
    return Described(to_device(lines, device), form_of_lines(*lines.shape))


@lru_cache(1024)
def form_of_lines(n: int, columns: int) -> HopperForm:
    """A table of int32, in blocks of 128 bytes, of which the first line matters: TMA writes to multiples of that."""
    return HopperForm([n, columns], [columns, 1], [32 // columns, columns], torch.int32)


@cache
def form_of_pieces(heads: int, rows: int, dtype: torch.dtype) -> HopperForm:
    columns = PIECES.value
    return HopperForm([heads, rows, columns], [rows * columns, columns, 1], [1, ROWS, columns], dtype)
