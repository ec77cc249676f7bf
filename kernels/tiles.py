"""Segments cut along a grid of tiles: what each tile of a kernel walks, as two small integer tables.

A query tile (forward, dQ) is a block of rows and walks keys; a key tile (dK and dV) is a block of keys and walks
rows. The part of a segment that crosses a tile is cut into runs of blocks: those that need no mask inside, and the
others. Segment(0, 8, 0, 12, 4), tiles and blocks of 4 either way (# seen whole):

           keys 0   4   8   12
    rows 0      |####|\\   |    |   query tile 0: keys 0-4 whole, 4-8 masked
                |####|\\\\\\ |    |
         4      |####|####|\\   |   query tile 1: keys 0-8 whole, 8-12 masked
                |####|####|\\\\\\ |
                                   key tile 0: rows 0-8 whole; 1: rows 0-4 masked, 4-8 whole; 2: rows 4-8 masked

What a segment shares with a tile that it covers only in part is masked. Tiles come longest first, so that the last
ones to run are short. Those that see nothing come after the first `busy` tiles: a launch into a result that already
holds what they would write leaves them out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .segments import NO_WINDOW, Segments, canonical_table

__all__ = ["Work", "key_tiles", "query_tiles"]


class Work(NamedTuple):
    """What one launch walks. Places in a tile and in a run count from 0.

    tiles [T, 4] int32: the tile's first row (or key), its first run, its first masked run, the end of its runs.
    runs [N, 6] int32: start, length, shift, low, high, window. The run walks the keys (or rows) start ..
        start + length, and only rows (or keys) low .. high of the tile take part. Row t sees key u iff
        t + shift - window < u <= t + shift, whichever of the two belongs to the tile. A run without a mask is a whole
        number of blocks long.
    """

    tiles: torch.Tensor
    runs: torch.Tensor
    busy: int  # tiles that have a run
    windowed: bool  # whether any run has a window

    def to(self, device: torch.device) -> Work:
        return self._replace(tiles=self.tiles.to(device), runs=self.runs.to(device))


def query_tiles(segments: Segments, rows: int, block_rows: int, block_keys: int) -> Work:
    """The work of one tile for every `block_rows` of `rows` rows; runs walk keys, in blocks of `block_keys`.

    Example:
        >>> work = query_tiles(Segments([Segment(0, 8, 0, 12, 4)]), 8, 4, 4)
        >>> work.tiles.tolist()
        [[4, 2, 3, 4], [0, 0, 1, 2]]
        >>> work.runs[:, :5].tolist()
        [[0, 4, 4, 0, 4], [4, 4, 0, 0, 4], [0, 8, 8, 0, 4], [8, 4, 0, 0, 4]]
    """
    q_start, q_len, k_start, k_len, offset, window = canonical_table(segments.table)[0].T
    segment, tile, first, low, high = cross(q_start, q_len, block_rows)
    shift, window = first - q_start[segment] + offset[segment], window[segment]
    from_first, from_last = (np.maximum(row + shift - window + 1, 0) for row in (low, high - 1))
    to_first, to_last = (np.minimum(row + shift + 1, k_len[segment]) for row in (low, high - 1))
    covered = (low == 0) & (high == np.minimum(block_rows, rows - first))
    pieces = split(from_first, from_last, to_first, to_last, covered, block_keys)
    return assemble(
        *((tile, k_start[segment] + start, end - start, shift - start, low, high, window) for start, end in pieces),
        extent=rows, block=block_rows, step=block_keys,
    )  # fmt: skip


def key_tiles(segments: Segments, keys: int, block_keys: int, block_rows: int) -> Work:
    """The work of one tile for every `block_keys` of `keys` keys; runs walk rows, in blocks of `block_rows`.

    Example:
        >>> work = key_tiles(Segments([Segment(0, 8, 0, 12, 4)]), 12, 4, 4)
        >>> work.tiles.tolist()
        [[0, 0, 1, 1], [4, 1, 2, 3], [8, 3, 3, 4]]
        >>> work.runs[:, :5].tolist()
        [[0, 8, 4, 0, 4], [4, 4, 4, 0, 4], [0, 4, 0, 0, 4], [4, 4, 0, 0, 4]]
    """
    q_start, q_len, k_start, k_len, offset, window = canonical_table(segments.table)[0].T
    segment, tile, first, low, high = cross(k_start, k_len, block_keys)
    shift, window = offset[segment] - (first - k_start[segment]), window[segment]
    from_first, from_last = (np.maximum(key - shift, 0) for key in (low, high - 1))
    to_first, to_last = (np.minimum(key - shift + window, q_len[segment]) for key in (low, high - 1))
    covered = (low == 0) & (high == np.minimum(block_keys, keys - first))
    pieces = split(from_first, from_last, to_first, to_last, covered, block_rows)
    return assemble(
        *((tile, q_start[segment] + start, end - start, shift + start, low, high, window) for start, end in pieces),
        extent=keys, block=block_keys, step=block_rows,
    )  # fmt: skip


def split(from_first, from_last, to_first, to_last, covered, step: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Cuts what a tile walks into three pieces (start, end), the first of which needs no mask.

    The first line of the tile sees from_first .. to_first and the last one from_last .. to_last, later in both ends;
    what all of them see is whole, in blocks of `step`, if the segment covers the tile.

    Example:
        >>> [(int(start), int(end)) for start, end in split(*map(np.array, (0, 3, 9, 12, True)), step=4)]
        [(4, 8), (0, 4), (8, 12)]
    """
    head = -(-(from_last - from_first) // step) * step
    whole = np.where(covered, np.maximum(to_first - from_first - head, 0) // step * step, 0)
    start = np.where(whole > 0, from_first + head, to_last)
    return (start, start + whole), (from_first, start), (start + whole, to_last)


def cross(start: np.ndarray, length: np.ndarray, block: int) -> tuple[np.ndarray, ...]:
    """Every crossing of an interval and a tile: which interval, which tile, where the tile starts, what it shares.

    Example:
        >>> [x.tolist() for x in cross(np.array([2]), np.array([5]), 4)]
        [[0, 0], [0, 1], [0, 4], [2, 0], [4, 3]]
    """
    first_tile = start // block
    count = (start + length - 1) // block - first_tile + 1
    interval = np.repeat(np.arange(len(start)), count)
    tile = np.arange(len(interval)) - np.repeat(np.cumsum(count) - count, count) + first_tile[interval]
    first = tile * block
    low = np.maximum(start[interval] - first, 0)
    high = np.minimum(start[interval] + length[interval] - first, block)
    return interval, tile, first, low, high


def assemble(whole: tuple, *masked: tuple, extent: int, block: int, step: int) -> Work:
    """Groups runs (tile, start, length, shift, low, high, window) by tile, those without a mask first; longest
    tiles first."""
    tiles = -(-extent // block)
    columns = np.concatenate([np.stack(runs, 1) for runs in (whole, *masked)])
    kind = np.repeat([0] + [1] * len(masked), len(whole[0]))
    real = columns[:, 2] > 0
    columns, kind = columns[real], kind[real]
    tile = columns[:, 0]
    order = np.argsort(2 * tile + kind, kind="stable")
    end = np.cumsum(np.bincount(tile, minlength=tiles))
    begin = np.concatenate(([0], end[:-1]))
    middle = end - np.bincount(tile, weights=kind, minlength=tiles).astype(np.int64)
    blocks = np.bincount(tile, weights=-(-columns[:, 2] // step), minlength=tiles)
    longest = np.argsort(-blocks, kind="stable")
    table = np.stack((np.arange(tiles) * block, begin, middle, end), 1)[longest]
    return Work(
        torch.from_numpy(table.astype(np.int32)),
        torch.from_numpy(columns[order, 1:].astype(np.int32)),
        int(np.count_nonzero(end > begin)),
        bool((columns[:, 6] < NO_WINDOW).any()),
    )
