"""The plan against brute force: the mask written out over global positions."""

import itertools

import pytest
import torch

from ringattn.kernels.reference import visible_pairs
from ringattn.layout import LAYOUTS
from ringattn.plan import make_plan

CASES = list(itertools.product(LAYOUTS, (1, 2, 3, 8), (0, 1, 7, 24, 50), (True, False)))


@pytest.mark.parametrize(("layout", "ranks", "seq_len", "causal"), CASES)
def test_segments_say_who_sees_whom(layout, ranks, seq_len, causal):
    plan = make_plan(layout, seq_len, ranks, causal=causal)
    for rank, source in itertools.product(range(ranks), repeat=2):
        queries, keys = plan.layout.positions(rank), plan.layout.positions(source)
        expected = (
            keys[None, :] <= queries[:, None] if causal else torch.ones(len(queries), len(keys), dtype=torch.bool)
        )
        segments = plan.segments(rank, source)
        assert torch.equal(visible_pairs(segments, len(queries), len(keys)), expected)
        assert sum(segment.pairs for segment in segments) == expected.sum(), "no pair is listed twice"


@pytest.mark.parametrize(("layout", "ranks", "seq_len", "causal"), CASES)
def test_work_and_traffic_add_up(layout, ranks, seq_len, causal):
    plan = make_plan(layout, seq_len, ranks, causal=causal)
    pairs = seq_len * (seq_len + 1) // 2 if causal else seq_len**2
    assert sum(plan.pairs(rank) for rank in range(ranks)) == pairs
    assert plan.flops(0, heads=2, head_dim=4, batch=3) == 4 * 4 * 2 * 3 * plan.pairs(0)
    sent = sum(plan.tokens_sent(rank) for rank in range(ranks))
    assert sent == sum(plan.reach(source) * plan.layout.lengths[source] for source in range(ranks))
    assert plan.bytes_sent(0, kv_heads=2, head_dim=4, itemsize=2) == plan.tokens_sent(0) * 2 * 8 * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_query_pieces_and_key_pieces_are_transposes(layout):
    plan = make_plan(layout, 23, 3, causal=True)
    by_query = {
        (rank, source, segment)
        for rank in range(3)
        for piece in plan.query_pieces(rank).values()
        for source, segment in piece
    }
    by_key = {
        (rank, source, segment)
        for source in range(3)
        for piece in plan.key_pieces(source).values()
        for rank, segment in piece
    }
    assert by_query == by_key


def test_reach_brings_every_shard_to_all_who_look_at_it():
    for layout, ranks in itertools.product(LAYOUTS, (2, 3, 8)):
        plan = make_plan(layout, 5, ranks, causal=True)
        for rank, source in itertools.product(range(ranks), repeat=2):
            if plan.segments(rank, source):
                assert (rank - source) % ranks <= plan.reach(source)


def test_balance():
    assert make_plan("zigzag", 1024, 4, causal=True).balance == 1.0
    assert make_plan("striped", 1024, 4, causal=True).balance > 0.99
    assert make_plan("contiguous", 1024, 4, causal=True).balance < 0.58
    assert make_plan("contiguous", 1024, 4, causal=False).balance == 1.0


def test_fingerprint_tells_plans_apart():
    plans = [make_plan(layout, s, 2, causal=c) for layout in LAYOUTS for s in (8, 9) for c in (True, False)]
    assert len({plan.fingerprint for plan in plans}) == len(plans)


def test_a_plan_prints_itself():
    assert str(make_plan("zigzag", 8, 2, causal=True)).splitlines()[1:] == [
        "rank    tokens    work  sends (tokens)  holds",
        "   0         4   50.0%               4  0..1 6..7",
        "   1         4   50.0%               4  2..3 4..5",
    ]
