"""Turns against the walk that they put in order."""

import random

import pytest

from ringattn.kernels.segments import Segments
from ringattn.kernels.tiles import key_tiles
from ringattn.kernels.turns import turns_of
from tests.kernels.test_kernels import cut


def walk(length: int, head: int, tail: int, block: int) -> list[int]:
    """Where the blocks of a run begin: without a mask, then the others, last rows first."""
    starts = range(0, length, block)
    whole = [j for j in starts if head <= j < tail]
    return whole[::-1] + [j for j in starts if j not in whole][::-1]


@pytest.mark.parametrize("seed", range(50))
def test_in_every_cell_turns_follow_the_order_of_the_tiles(seed):
    draw = random.Random(seed)
    rows, keys, block = draw.randint(1, 60), draw.randint(1, 60), draw.choice([4, 16])
    work = key_tiles(cut(rows, keys, draw), keys, block, block)
    visits, turns = turns_of(work, block)
    count = [0] * (rows // block + 2)
    for _, begin, end in work.tiles.tolist():
        for i_run in range(begin, end):
            start, length, head, tail, *_ = work.runs[i_run].tolist()
            for n, j in enumerate(walk(length, head, tail, block)):
                cells = {(start + t) // block for t in range(j, min(j + block, length))}
                expected = [count[cell] for cell in sorted(cells)]
                assert turns[visits[i_run] + n].tolist() == [*expected, -1][:2]
                for cell in cells:
                    count[cell] += 1


def test_no_tiles_no_turns():
    work = key_tiles(Segments(), 8, 4, 4)
    assert turns_of(work, 4).turns.shape == (0, 2)
