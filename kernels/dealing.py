"""Which program of a launch works on which tiles, and in which order, so that a GPU is busy until the end.

A piece of work is a tile for one head, or for a few that share keys. Pieces come in sections of as many heads as share
the L2 cache; in a section the longest tiles come first, and for one tile its heads side by side.

Where programs stay until the end (`deal`), each piece goes to the program that will be done first with what it has. So
a queue would deal them as the programs run; here it is worked out beforehand, by the blocks that each walks. Dealt in
turn, lengths that come in steps leave some programs a twentieth more to do than others: a shard of the zigzag layout
has tiles of 96 to 128 blocks and then of 1 to 32. A shard without short tiles leaves a hundredth: it has 32 to 96, and
nothing to fill gaps with. So in the end programs trade pieces of the last section (`even_out`).

Where every piece has a program of its own (`queue`), the GPU starts the next one where one has ended. A section that
begins with long pieces when the others are nearly done holds up the end, with packed documents by a quarter of the
time. There sections are wider, or the short pieces of all sections wait until all long ones have started. Elsewhere
they do not, because then more heads are walked at once than the L2 cache holds, which takes a few percent. Tiles of
another rank's keys are mostly seen by the same rows, all of a chunk. They come first in a section, unless then the end
is later: side by side they walk the same rows at the same time, from start to end. With 32768 tokens on each of two
GPUs that spares the first one 6% of its backward, in energy: the cycles are as many.
"""

from __future__ import annotations

from heapq import heapreplace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from .segments import NO_WINDOW, Segments
from .tiles import Work, query_tiles, to_device

__all__ = ["Dealt", "Queue", "deal", "dealt_tiles", "queue"]

BEGINNING = 1.5  # what a tile takes besides its blocks, in blocks
EVEN = 1.001  # the most that a program should do, as a part of the mean
OFFERS = 2048  # pieces, about, that the busiest program looks at for a trade: of those that have least to do
LONGER = 1.03  # how much longer an order may take than one that uses the L2 cache less well


class Dealt(NamedTuple):
    """The work of a launch.

    pieces [1 + R, P, 4] int32: how many pieces each of P programs has; then its pieces one after the other: first head
        (of all sequences' heads), the tile's first row, its first run, the end of its runs.
    runs [N, 8] int32: see `tiles.Work`.
    """

    pieces: torch.Tensor
    runs: torch.Tensor
    windowed: bool

    @property
    def programs(self) -> int:
        return self.pieces.shape[1]

    def to(self, device: torch.device) -> Dealt:
        return self._replace(pieces=to_device(self.pieces, device), runs=to_device(self.runs, device))


def hand_out(lengths: np.ndarray, programs: int) -> tuple[list[int], np.ndarray]:
    """Who gets each of some pieces, one after the other given to whoever is done first, and when it is done.

    Example:
        >>> owners, ends = hand_out(np.array([4.0, 2.0, 1.0, 3.0]), 2)
        >>> owners, ends.tolist()
        ([0, 1, 1, 1], [4.0, 2.0, 3.0, 6.0])
    """
    owners, ends, done = [], np.empty(len(lengths)), [(0.0, program) for program in range(programs)]
    for i, length in enumerate(lengths.tolist()):
        at, program = done[0]
        owners.append(program)
        ends[i] = at + length
        heapreplace(done, (at + length, program))
    return owners, ends


def deal(blocks: np.ndarray, heads: int, side: int, programs: int) -> list[list[tuple[int, int]]]:
    """The pieces (head, tile) of each program: tiles of so many blocks for every head, section after section of `side`
    heads.

    Example:
        >>> deal(np.array([4, 2, 1]), heads=2, side=2, programs=3)
        [[(0, 0), (0, 2)], [(1, 0), (1, 2)], [(0, 1), (1, 1)]]
    """
    hands: list[list[tuple[int, int]]] = [[] for _ in range(programs)]
    tile, head = sections(0, len(blocks), heads, side)
    lengths = blocks[tile] + BEGINNING
    owners = np.array(hand_out(lengths, programs)[0], int)
    even_out(owners, lengths, programs, len(blocks) * (heads - side))
    for program, piece in zip(owners.tolist(), zip(head.tolist(), tile.tolist(), strict=True), strict=True):
        hands[program].append(piece)
    return hands


def even_out(owners: np.ndarray, lengths: np.ndarray, programs: int, first: int) -> None:
    """Swaps pieces, from `first` on, between whoever has most to do and others, as long as the busier of the two then
    has less; in place.

    Example:
        >>> owners = np.array([0, 0, 1, 1])  # with 9 and 7 to do
        >>> even_out(owners, np.array([5.0, 4.0, 4.0, 3.0]), 2, 0)
        >>> owners.tolist()
        [0, 1, 1, 0]
    """
    loads = np.bincount(owners, lengths, programs)
    owners, lengths = owners[first:], lengths[first:]
    most = min(programs - 1, OFFERS * programs // max(len(owners), 1))
    for _ in range(2 * programs):
        order = np.argsort(loads, kind="stable")
        busiest = int(order[-1])
        if loads[busiest] <= EVEN * loads.mean():
            break
        mine = (owners == busiest).nonzero()[0]
        mine = mine[np.unique(lengths[mine], return_index=True)[1]]
        others = np.isin(owners, order[:most]).nonzero()[0]
        if not len(mine) or not len(others):
            break
        less = lengths[mine, None] - lengths[others]
        after = np.maximum(loads[busiest] - less, loads[owners[others]] + less)
        give, take = divmod(int(after.argmin()), len(others))
        if after[give, take] >= loads[busiest]:
            break
        give, take = mine[give], others[take]
        peer = int(owners[take])
        less = lengths[give] - lengths[take]
        loads[busiest] -= less
        loads[peer] += less
        owners[give], owners[take] = peer, busiest


def dealt_tiles(
    segments: Segments,
    rows: int,
    block_rows: int,
    block_keys: int,
    heads: int,
    side: int,
    programs: int,
    all: bool,
    near: int = NO_WINDOW,
    together: int = 1,
) -> Dealt:
    """The tiles of `rows` query rows, for so many heads, `together` in a piece, dealt to at most so many programs; with
    `all`, also those that see nothing. Keys from `near` on may come later: in each section of `side` heads, programs
    begin with tiles that do not see them."""
    heads, side = heads // together, side // together
    work = query_tiles(segments, rows, block_rows, block_keys)
    tiles = work.tiles.numpy()[: None if all else work.busy]
    hands = deal(work.blocks(block_keys)[: len(tiles)], heads, side, min(programs, len(tiles) * heads))
    far = np.append(0, np.cumsum(work.runs[:, 0].numpy() >= near))
    waits = (far[tiles[:, 2]] > far[tiles[:, 1]]).tolist()
    for hand in hands:
        hand.sort(key=lambda piece: (piece[0] // side, waits[piece[1]]))
    pieces = np.zeros((1 + max(map(len, hands), default=0), len(hands), 4), np.int32)
    for program, hand in enumerate(hands):
        head, tile = np.array(hand).T
        pieces[0, program, 0] = len(hand)
        pieces[1 : 1 + len(hand), program] = np.concatenate((together * head[:, None], tiles[tile]), 1)
    runs = work.runs if len(work.runs) else work.runs.new_zeros(1, 8)  # a kernel that looks ahead finds one
    return Dealt(torch.from_numpy(pieces), runs, work.windowed)


class Queue(NamedTuple):
    """pieces int32 [tiles * heads, 4]: in the order in which their programs start; columns as in `Dealt.pieces`.
    tiles int64 [tiles]: which tile of the work comes first, second, ...: of every head in this order, so that they may
        wait for each other (`turns.py`).
    """

    pieces: torch.Tensor
    tiles: np.ndarray


def queue(
    work: Work,
    step: int,
    tiles: int,
    heads: int,
    side: int,
    programs: int,
    beginning: float = BEGINNING,
    far: int = NO_WINDOW,
) -> Queue:
    """The first so many tiles of `work`, in blocks of `step`, for all heads, in the order in which their programs start
    where so many run at once. A piece takes as long as `beginning` blocks besides its own. Keys from `far` on are other
    ranks'.

    Orders come in sections of `side` heads, of twice and of four times as many, and then with the short pieces of all
    sections at the end; tiles come longest first, and before that with those of far keys first. Of these the first,
    unless a later one, which uses the L2 cache less well, beats it by more than LONGER.

    Example (tiles of 1, 2 and 3 blocks, two heads that do not share the cache):
        >>> from .segments import Segment, Segments
        >>> work = query_tiles(Segments([Segment(0, 12, 0, 12, 0)]), 12, 4, 4)
        >>> queue(work, 4, 3, 2, 1, 2).pieces[:, :2].tolist()
        [[0, 8], [1, 8], [0, 4], [1, 4], [0, 0], [1, 0]]
    """
    table = work.tiles.numpy()[:tiles]
    length, others = work.blocks(step)[:tiles] + beginning, table[:, 0] >= far
    least = max(heads * length.sum() / programs, length.max(initial=0))  # no order is over before
    ways = [np.argsort(~others, kind="stable")] * bool(others.any()) + [np.arange(tiles)]
    sides = [n * side for n in (1, 2, 4) if heads % (n * side) == 0]
    chosen, end = (ways[0], np.empty((2, 0), np.int64)), np.inf
    for late, each, way in product((False, True), sides, ways):
        if end <= LONGER * least:
            break
        order = arranged(length[way], heads, each, programs if late else 0)
        tile = way[order[0]]
        found = hand_out(length[tile], programs)[1].max(initial=0)
        if found * LONGER < end:
            chosen, end = (way, order), found
    way, (tile, head) = chosen
    return Queue(torch.from_numpy(np.column_stack((head, table[way[tile]])).astype(np.int32)), way)


def arranged(length: np.ndarray, heads: int, side: int, programs: int = 0) -> np.ndarray:
    """Tile and head of each piece, [2, tiles * heads], in sections of `side` heads; where programs are given, with the
    last pieces of all sections at the end, as many as fill half of the time that the longest one takes."""
    tiles = len(length)
    left = heads * np.cumsum(length[::-1])[::-1]  # from each tile on
    long = int(np.count_nonzero(2 * left > programs * length.max(initial=0)))
    return np.concatenate((sections(0, long, heads, side), sections(long, tiles, heads, heads)), 1)


def sections(first: int, end: int, heads: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Tile and head of each piece, in sections of `side` heads: in one tile by tile, and for a tile head by head.

    Example:
        >>> [x.tolist() for x in sections(3, 5, 4, 2)]
        [[3, 3, 4, 4, 3, 3, 4, 4], [0, 1, 0, 1, 2, 3, 2, 3]]
    """
    section, rest = np.divmod(np.arange((end - first) * heads), max((end - first) * side, 1))
    tile, head = np.divmod(rest, side)
    return first + tile, section * side + head
