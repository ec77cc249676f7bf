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
    """The turns of key tiles whose runs walk rows in blocks of `block`, on cells of as many rows.

    Example (two tiles walk rows 0 .. 8 and 2 .. 8 in blocks of 4):
        >>> tiles, runs = torch.tensor([[0, 0, 1], [4, 1, 2]]), torch.zeros(2, 8, dtype=torch.int64)
        >>> runs[:, :2] = torch.tensor([[0, 8], [2, 6]])
        >>> turns_of(Work(tiles, runs, 2, False), 4)
        Turns(visits=tensor([0, 2], dtype=torch.int32), turns=tensor([[ 0, -1],
                [ 0, -1],
                [ 1,  1],
                [ 2, -1]], dtype=torch.int32))
    """
    tiles, runs = work.tiles.numpy().astype(np.int64), work.runs.numpy().astype(np.int64)
    count = tiles[:, 2] - tiles[:, 1]
    order = np.repeat(tiles[:, 1] - (np.cumsum(count) - count), count) + np.arange(count.sum())  # of the runs
    start, length = runs[order, 0], runs[order, 1]
    blocks = -(-length // block)
    begin = np.cumsum(blocks) - blocks
    row = np.repeat(start - begin * block, blocks) + np.arange(blocks.sum()) * block
    last_row = np.minimum(row + block, np.repeat(start + length, blocks)) - 1
    cells = np.stack((row // block, last_row // block), 1)
    touched = np.stack((np.ones_like(row, bool), cells[:, 1] > cells[:, 0]), 1).ravel()
    cell = cells.ravel()[touched]
    by_cell = np.argsort(cell, kind="stable")
    first = np.concatenate(([True], cell[by_cell][1:] != cell[by_cell][:-1]))
    place = np.arange(len(cell))
    rank = np.empty_like(place)
    rank[by_cell] = place - np.maximum.accumulate(np.where(first, place, 0))
    turns = np.full(2 * len(row), -1)
    turns[touched] = rank
    visits = np.zeros(len(runs), np.int64)
    visits[order] = begin
    return Turns(*(torch.from_numpy(x.astype(np.int32)) for x in (visits, turns.reshape(-1, 2))))
