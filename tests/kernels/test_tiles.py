"""Tiles against the mask that their segments stand for."""

import random
import time

import pytest
import torch

from ringattn.kernels.reference import visible_pairs
from ringattn.kernels.segments import Segment, Segments
from ringattn.kernels.tiles import Work, key_tiles, query_tiles
from tests.kernels.test_kernels import cut


def times_seen(work: Work, rows: int, keys: int, of_queries: bool, block: int, step: int) -> torch.Tensor:
    """How often each pair is computed, int [rows, keys]."""
    seen = torch.zeros(rows, keys, dtype=torch.int)
    tile_axis = seen if of_queries else seen.T  # [along tiles, along runs]
    for number, (first, begin, end) in enumerate(work.tiles.tolist()):
        assert (end > begin) == (number < work.busy)
        for start, length, head, tail, shift, low, high, window in work.runs[begin:end].tolist():
            assert head % step == tail % step == 0
            assert head <= tail <= max(head, length)
            t, u = torch.arange(low, high)[:, None], torch.arange(length)[None, :]
            back = t + shift - u if of_queries else u + shift - t
            visible = (back >= 0) & (back < window)
            if head < tail:  # blocks without a mask: every row and key of the tile
                assert (low, first + high) == (0, min(first + block, len(tile_axis)))
                assert visible[:, head:tail].all()
            tile_axis[first + low : first + high, start : start + length] += visible
    return seen


@pytest.mark.parametrize("seed", range(200))
def test_every_visible_pair_is_computed_once(seed):
    draw = random.Random(seed)
    rows, keys = draw.randint(1, 40), draw.randint(1, 40)
    block, step = draw.choice([1, 4, 16]), draw.choice([1, 4, 16])
    segments = cut(rows, keys, draw)
    visible = visible_pairs(segments, rows, keys).int()
    assert torch.equal(times_seen(query_tiles(segments, rows, block, step), rows, keys, True, block, step), visible)
    assert torch.equal(times_seen(key_tiles(segments, keys, block, step), rows, keys, False, block, step), visible)


def test_only_the_diagonal_of_an_aligned_mask_is_masked():
    causal = Segments([Segment(0, 1024, 0, 1024, 0)])
    for work, masked in ((query_tiles(causal, 1024, 128, 64), 128), (key_tiles(causal, 1024, 128, 64), 128)):
        _, length, head, tail, *_ = work.runs.T
        assert (head + length - tail == masked).all()


def test_tiles_come_longest_first_and_idle_ones_last():
    work = query_tiles(Segments([Segment(0, 64, 0, 64, 0)]), 96, 16, 16)
    assert work.tiles[:, 0].tolist() == [48, 32, 16, 0, 64, 80]
    assert work.busy == 4


def test_the_runs_of_a_key_tile_come_last_rows_first():
    """Keys that three pieces of rows see, and keys that only the last one sees."""
    pieces = [Segment(start, 8, 0, 8, 8) for start in (0, 8, 16)] + [Segment(16, 8, 8, 4, 8)]
    work = key_tiles(Segments(pieces), 12, 4, 4)
    starts = [work.runs[begin:end, 0].tolist() for _, begin, end in work.tiles.tolist()]
    assert starts == [[16, 8, 0], [16, 8, 0], [16]]


def test_no_segments_no_work():
    for segments in (Segments(), Segments([Segment(0, 4, 0, 4, -4)])):
        for work in (query_tiles(segments, 8, 4, 4), key_tiles(segments, 8, 4, 4)):
            assert work.busy == 0
            assert len(work.tiles) == 2


def test_a_million_tokens_of_short_documents_lower_quickly():
    documents = Segments([Segment(16 * i, 16, 16 * i, 16, 0) for i in range(1 << 16)])
    begin = time.perf_counter()
    work = query_tiles(documents, 1 << 20, 128, 64)
    assert time.perf_counter() - begin < 2
    assert len(work.runs) == 1 << 16
