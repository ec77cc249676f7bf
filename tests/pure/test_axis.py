"""Keys laid on one axis: the same pairs are seen, wherever the keys lie."""

import itertools

import pytest
import torch

from ringattn.executors.axis import slots, spans, within
from ringattn.kernels.reference import visible_pairs
from ringattn.layout import LAYOUTS
from ringattn.plan import make_plan

CASES = list(itertools.product(LAYOUTS, (1, 2, 3, 5), (0, 3, 24, 50), (True, False)))


@pytest.mark.parametrize(("layout", "ranks", "seq_len", "causal"), CASES)
def test_an_axis_shows_what_the_shards_show(layout, ranks, seq_len, causal):
    plan = make_plan(layout, seq_len, ranks, causal=causal)
    for rank in range(ranks):
        others = [(rank + step) % ranks for step in range(1, ranks)]
        rows = plan.layout.lengths[rank]
        for axis in (slots(plan, rank), spans(plan, rank, [rank, *others], whole=rank), spans(plan, rank, others)):
            seen = visible_pairs(axis.segments, rows, axis.length)
            listed = sum(segment.pairs for segment in axis.segments)
            assert listed == seen.sum(), "no pair is listed twice"
            for piece in axis.pieces:
                shard = visible_pairs(plan.segments(rank, piece.source), rows, plan.layout.lengths[piece.source])
                assert torch.equal(seen[:, piece.place], shard[:, piece.start : piece.stop])
                assert not shard[:, : piece.start].any()
                assert not shard[:, piece.stop :].any()
                assert piece.of(piece.start, piece.stop) == piece.place


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_of_the_keys(layout):
    plan = make_plan(layout, 30, 3, causal=True)
    segments = plan.segments(1, 1)
    whole = visible_pairs(segments, 10, 10)
    for start, stop in itertools.combinations(range(11), 2):
        assert torch.equal(visible_pairs(within(segments, start, stop), 10, stop - start), whole[:, start:stop])
