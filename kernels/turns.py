"""In which order the tiles of keys add to a sum over rows, so that it comes out the same bit by bit.

Tiles run side by side and each adds what it has for a block of rows; floating-point sums depend on the order. So every
cell of rows has a counter, and whoever adds to the cell waits until as many have been there as come before it in the
order of the tiles. A block of a run that starts on a cell touches one, any other block two.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .tiles import Work

__all__ = ["Turns", "turns_of"]


class Turns(NamedTuple):
    """visits [N] int32: for each run of the work, where its blocks begin in `turns`.
    turns [V, 2] int32: for each block of a run, how many come before it in the cell where it starts and in the next
        one; -1 for a cell that it does not touch.
    """

    visits: torch.Tensor
    turns: torch.Tensor

    def to(self, device: torch.device) -> Turns:
        return Turns(self.visits.to(device), self.turns.to(device))


def turns_of(work: Work, block: int) -> Turns:
    """The turns of key tiles whose runs walk rows in blocks of `block`, on cells of as many rows. Blocks of a run come
    in the order of the walk (`hopper_walk.block_at`): those without a mask, then the others, last rows first.

    Example (two tiles walk rows 0 .. 8 and 2 .. 8 in blocks of 4, all masked):
        >>> tiles, runs = torch.tensor([[0, 0, 1], [4, 1, 2]]), torch.zeros(2, 8, dtype=torch.int64)
        >>> runs[:, :2] = torch.tensor([[0, 8], [2, 6]])
        >>> turns = turns_of(Work(tiles, runs, 2, False), 4)
        >>> turns.visits.tolist(), turns.turns.tolist()
        ([0, 2], [[0, -1], [0, -1], [1, -1], [1, 2]])
    """
    tiles, runs = work.tiles.numpy().astype(np.int64), work.runs.numpy().astype(np.int64)
    count = tiles[:, 2] - tiles[:, 1]
    order = np.repeat(tiles[:, 1] - (np.cumsum(count) - count), count) + np.arange(count.sum())  # of the runs
    blocks = -(-runs[order, 1] // block)
    begin = np.cumsum(blocks) - blocks
    start, length, head, tail = np.repeat(runs[order, :4], blocks, 0).T
    n = np.arange(blocks.sum()) - np.repeat(begin, blocks)
    masked = (-(-length // block) - 1 - n) * block
    j = np.where(
        n < (tail - head) // block, tail - (n + 1) * block, np.where(masked < head, masked, masked - head + tail)
    )
    first, last = (start + j) // block, (start + np.minimum(j + block, length) - 1) // block
    touched = np.stack((np.ones_like(first, bool), last > first), 1).ravel()
    cell = np.stack((first, last), 1).ravel()[touched]
    turns = np.full(len(touched), -1)
    turns[touched] = rank_among_equals(cell)
    visits = np.zeros(len(runs), np.int64)
    visits[order] = begin
    return Turns(*(torch.from_numpy(x.astype(np.int32)) for x in (visits, turns.reshape(-1, 2))))


def rank_among_equals(x: np.ndarray) -> np.ndarray:
    """How many equal values come before each.

    Example:
        >>> rank_among_equals(np.array([3, 5, 3, 3, 5])).tolist()
        [0, 0, 1, 2, 1]
    """
    order = np.argsort(x, kind="stable")
    place = np.arange(len(x))
    new = np.diff(x[order], prepend=np.nan) != 0
    rank = np.empty_like(place)
    rank[order] = place - np.maximum.accumulate(np.where(new, place, 0))
    return rank
