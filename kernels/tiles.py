"""Segments cut along a grid of tiles: what each tile of a kernel walks, as two small integer tables.

A query tile (forward, dQ) is a block of rows and walks keys; a key tile (dK and dV) is a block of keys and walks
rows. The part of a segment that crosses a tile is a run of blocks; the blocks in its middle that the whole tile sees
need no mask. Segment(0, 8, 0, 12, 4), tiles and blocks of 4 either way (# seen whole):

           keys 0   4   8   12
    rows 0      |####|\\   |    |   query tile 0: keys 0-8, whole from 0 to 4
                |####|\\\\\\ |    |
         4      |####|####|\\   |   query tile 1: keys 0-12, whole from 0 to 8
                |####|####|\\\\\\ |
                                   key tile 0: rows 0-8, all whole; 1: rows 0-8, whole from 4; 2: rows 4-8

What a segment shares with a tile that it covers only in part is masked. Tiles come longest first, so that the last
ones to run are short. Those that see nothing come after the first `busy` tiles: a launch into a result that already
holds what they would write leaves them out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .segments import NO_WINDOW, Segments, canonical_table

__all__ = ["Work", "key_tiles", "query_tiles", "to_device"]


class Work(NamedTuple):
    """What one launch walks. Places in a tile and in a run count from 0.

    tiles [T, 3] int32: the tile's first row (or key), its first run, the end of its runs.
    runs [N, 8] int32: start, length, head, tail, shift, low, high, window. The run walks the keys (or rows) start ..
        start + length in blocks, and only rows (or keys) low .. high of the tile take part. Row t sees key u iff
        t + shift - window < u <= t + shift, whichever of the two belongs to the tile. Blocks from head to tail are
        full ones that the whole tile sees.
    """

    tiles: torch.Tensor
    runs: torch.Tensor
    busy: int  # tiles that have a run
    windowed: bool  # whether any run has a window

    def to(self, device: torch.device) -> Work:
        return self._replace(tiles=to_device(self.tiles, device), runs=to_device(self.runs, device))

    def blocks(self, step: int) -> np.ndarray:
        """How many blocks of `step` each tile walks: int64 [T]."""
        before = np.append(0, np.cumsum(-(-self.runs[:, 1].numpy() // step)))
        _, begin, end = self.tiles.T.numpy()
        return before[end] - before[begin]


def to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device. The host does not wait for what a GPU still has to do before."""
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


def query_tiles(segments: Segments, rows: int, block_rows: int, block_keys: int) -> Work:
    """The work of one tile for every `block_rows` of `rows` rows; runs walk keys, in blocks of `block_keys`.

    Example:
        >>> work = query_tiles(Segments([Segment(0, 8, 0, 12, 4)]), 8, 4, 4)
        >>> work.tiles.tolist()
        [[4, 1, 2], [0, 0, 1]]
        >>> work.runs[:, :7].tolist()
        [[0, 8, 0, 4, 4, 0, 4], [0, 12, 0, 8, 8, 0, 4]]
    """
    q_start, q_len, k_start, k_len, offset, window = canonical_table(segments.table)[0].T
    segment, tile, first, low, high = cross(q_start, q_len, block_rows)
    shift, window = first - q_start[segment] + offset[segment], window[segment]
    from_first, from_last = (np.maximum(row + shift - window + 1, 0) for row in (low, high - 1))
    to_first, to_last = (np.minimum(row + shift + 1, k_len[segment]) for row in (low, high - 1))
    covered = (low == 0) & (high == np.minimum(block_rows, rows - first))
    head, tail = middle(from_last - from_first, to_first - from_first, covered, block_keys)
    start, length = k_start[segment] + from_first, to_last - from_first
    runs = start, length, head, tail, shift - from_first, low, high, window
    return assemble(tile, runs, rows, block_rows, block_keys)


def key_tiles(segments: Segments, keys: int, block_keys: int, block_rows: int) -> Work:
    """The work of one tile for every `block_keys` of `keys` keys; runs walk rows, in blocks of `block_rows`, and come
    last rows first.

    Example:
        >>> work = key_tiles(Segments([Segment(0, 8, 0, 12, 4)]), 12, 4, 4)
        >>> work.tiles.tolist()
        [[0, 0, 1], [4, 1, 2], [8, 2, 3]]
        >>> work.runs[:, :7].tolist()
        [[0, 8, 0, 8, 4, 0, 4], [0, 8, 4, 8, 0, 0, 4], [4, 4, 4, 4, 0, 0, 4]]
    """
    q_start, q_len, k_start, k_len, offset, window = canonical_table(segments.table)[0].T
    segment, tile, first, low, high = cross(k_start, k_len, block_keys)
    shift, window = offset[segment] - (first - k_start[segment]), window[segment]
    from_first, from_last = (np.maximum(key - shift, 0) for key in (low, high - 1))
    to_first, to_last = (np.minimum(key - shift + window, q_len[segment]) for key in (low, high - 1))
    covered = (low == 0) & (high == np.minimum(block_keys, keys - first))
    head, tail = middle(from_last - from_first, to_first - from_first, covered, block_rows)
    start, length = q_start[segment] + from_first, to_last - from_first
    runs = start, length, head, tail, shift + from_first, low, high, window
    return assemble(tile[::-1], tuple(x[::-1] for x in runs), keys, block_keys, block_rows)


def middle(last_begins: np.ndarray, first_ends: np.ndarray, covered: np.ndarray, step: int) -> tuple[np.ndarray, ...]:
    """From where to where a run needs no mask: blocks of `step` between the place where the last line of the tile
    begins to see and the one where the first line ends to, if the segment covers the tile.

    Example:
        >>> [int(x) for x in middle(np.array(3), np.array(9), np.array(True), step=4)]
        [4, 8]
    """
    head = -(-last_begins // step) * step
    blocks = np.where(covered, np.maximum(first_ends - head, 0) // step, 0)
    return head, head + blocks * step


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


def assemble(tile: np.ndarray, runs: tuple[np.ndarray, ...], extent: int, block: int, step: int) -> Work:
    """Groups runs by tile; longest tiles first."""
    tiles = -(-extent // block)
    columns = np.stack(runs, 1)[np.argsort(tile, kind="stable")]
    count = np.bincount(tile, minlength=tiles)
    end = np.cumsum(count)
    blocks = np.bincount(tile, weights=-(-runs[1] // step), minlength=tiles)
    longest = np.argsort(-blocks, kind="stable")
    table = np.stack((np.arange(tiles) * block, end - count, end), 1)[longest]
    return Work(
        torch.from_numpy(table.astype(np.int32)),
        torch.from_numpy(columns.astype(np.int32)),
        int(np.count_nonzero(count)),
        bool((columns[:, -1] < NO_WINDOW).any()),
    )
