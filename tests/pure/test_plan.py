"""The plan against brute force: the mask written out over global positions."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import balance
from ringattn.kernels.reference import visible_pairs
from ringattn.layout import LAYOUTS
from ringattn.mask import Mask, make_mask
from ringattn.plan import make_plan
from tests.dense import visible

CASES = list(itertools.product(LAYOUTS, (1, 2, 3, 8), (0, 1, 7, 24, 50), (True, False)))


@pytest.fixture(autouse=True, scope="module")
def short_chunks():
    """Chunks of the balanced layout as short as these sequences."""
    shortest, balance.SHORTEST = balance.SHORTEST, 1
    yield
    balance.SHORTEST = shortest


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
    cargo = [plan.cargo(source, hop) for source in range(ranks) for hop in range(1, plan.reach(source) + 1)]
    assert sent == sum(keys.stop - keys.start for keys in cargo)
    assert sent <= sum(plan.reach(source) * plan.layout.lengths[source] for source in range(ranks))
    assert plan.bytes_sent(0, kv_heads=2, head_dim=4, itemsize=2) == plan.tokens_sent(0) * 2 * 8 * 2


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
        "   0         4   50.0%               2  0..1 6..7",
        "   1         4   50.0%               4  2..3 4..5",
    ]


@st.composite
def masked_plans(draw: st.DrawFn) -> tuple:
    """(layout, tokens, ranks, causal, window, cu_seqlens)"""
    seq_len = draw(st.integers(0, 130))
    side = st.sampled_from([-1, -1, 0, 1, 5, 40])
    cuts = st.lists(st.integers(0, seq_len), max_size=12).map(lambda cuts: sorted([0, *cuts]))
    return (
        draw(st.sampled_from(list(LAYOUTS))),
        seq_len,
        draw(st.integers(1, 8)),
        draw(st.booleans()),
        (draw(side), draw(side)),
        draw(st.none() | cuts | cuts.map(lambda cuts: [*cuts, seq_len])),
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(masked_plans())
def test_documents_and_windows_in_every_layout(drawn):
    layout, seq_len, ranks, causal, window, cu_seqlens = drawn
    plan = make_plan(layout, seq_len, ranks, causal=causal, window_size=window, cu_seqlens=cu_seqlens)
    work = np.zeros(seq_len, np.int64)
    for rank in range(ranks):
        queries = plan.layout.positions(rank)
        for source in range(ranks):
            keys = plan.layout.positions(source)
            expected = visible(queries, keys, causal, window, cu_seqlens)
            segments = plan.segments(rank, source)
            assert torch.equal(visible_pairs(segments, len(queries), len(keys)), expected)
            assert segments.pairs == expected.sum(), "no pair is listed twice"
            assert all(segment.canonical() == segment for segment in segments)
            assert not expected.any() or (rank - source) % ranks <= plan.reach(source)
            work[queries.numpy()] += expected.sum(1).numpy()
    before = plan.mask.pairs_before(np.arange(seq_len + 1), seq_len)
    assert before.tolist() == [0, *np.cumsum(work)], "the work by which the balanced layout goes"
    assert sum(plan.pairs(rank) for rank in range(ranks)) == before[-1]


def test_a_window_costs_communication_of_its_length():
    for seq_len, window, hops in ((1 << 17, 4096, 1), (1 << 16, 1 << 13, 1), (1 << 16, 2 + (1 << 13), 2)):
        plan = make_plan("contiguous", seq_len, 8, causal=True, window_size=window)
        assert max(plan.reach(source) for source in range(8)) == hops
        assert max(plan.tokens_sent(rank) for rank in range(8)) == window - 1
        assert plan.reach(7) == 0


def test_one_mask_has_one_spelling():
    assert make_mask(True) == Mask(causal=True) == Mask(causal=True, window=(-1, 5)) == Mask(window=(-1, 0))
    assert make_mask(True, 4) == make_mask(True, (3, 3)) == make_mask(False, (3, 0))
    assert make_mask(False, (3, 4)) != make_mask(False, (4, 3))
    assert make_plan("zigzag", 8, 2, causal=True) is make_plan("zigzag", 8, 2, causal=True, window_size=(-1, -1))
    documents = [make_plan("balanced", 8, 2, causal=True, cu_seqlens=form) for form in ([0, 8], torch.tensor([0, 8]))]
    assert documents[0] is documents[1]


@pytest.mark.parametrize(
    ("causal", "window_size", "message"),
    [
        (False, 4, r"without causal pass \(left, right\)"),
        (True, 0, "at least its own"),
        (True, (1, 2, 3), r"pass \(left, right\)"),
        (True, (-2, 0), r"pass \(left, right\)"),
        (True, (1.5, 0), r"pass \(left, right\)"),
    ],
)
def test_what_is_no_window_raises(causal, window_size, message):
    with pytest.raises(ValueError, match=message):
        make_mask(causal, window_size)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(masked_plans())
def test_traffic_is_what_the_mask_needs(drawn):
    layout, seq_len, ranks, causal, window, cu_seqlens = drawn
    plan = make_plan(layout, seq_len, ranks, causal=causal, window_size=window, cu_seqlens=cu_seqlens)
    for source in range(ranks):
        keys = plan.layout.positions(source)
        looked_at = [visible(plan.layout.positions(r), keys, causal, window, cu_seqlens).any(0) for r in range(ranks)]
        assert plan.keys_needed[:, source].tolist() == [int(each.sum()) for each in looked_at]
        for hop in range(1, ranks):
            cargo = plan.cargo(source, hop)
            further = torch.stack([looked_at[(source + h) % ranks] for h in range(hop, ranks)]).any(0).nonzero()
            assert (cargo.start, cargo.stop) == ((0, 0) if not len(further) else (further[0], further[-1] + 1))
