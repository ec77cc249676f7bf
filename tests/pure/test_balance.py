"""The balanced layout: as much work for every rank as the chunks allow, as many tokens, and quickly."""

import itertools
import time

import numpy as np
import pytest

from ringattn.documents import Documents
from ringattn.launch.packing import LENGTHS, packed
from ringattn.layout import make_layout
from ringattn.mask import Mask, make_mask
from ringattn.plan import make_plan


@pytest.mark.parametrize("ranks", [4, 8, 64])
@pytest.mark.parametrize("name", LENGTHS)
def test_work_is_balanced_and_tokens_are_equal(name, ranks):
    for tokens in (2048, 8192):
        plan = make_plan("balanced", tokens * ranks, ranks, causal=True, cu_seqlens=packed(name, tokens * ranks, 0))
        assert plan.balance > 1 / 1.03, f"{tokens} tokens a rank: balance {plan.balance:.3f}"
        assert set(plan.layout.lengths) == {tokens}


def test_a_dense_causal_mask_is_zigzag():
    balanced, zigzag = (make_plan(name, 8192, 4, causal=True) for name in ("balanced", "zigzag"))
    assert [balanced.layout.positions(rank).tolist() for rank in range(4)] == [
        zigzag.layout.positions(rank).tolist() for rank in range(4)
    ]


def test_what_is_balanced_in_order_stays_in_order():
    contiguous = make_layout("contiguous", 1 << 17, 4)
    for mask in (Mask(), make_mask(True, 4096), make_mask(True, None, range(0, (1 << 17) + 1, 4096))):
        assert make_layout("balanced", 1 << 17, 4, mask).runs == contiguous.runs, str(mask)


def test_chunks_that_would_unbalance_are_swapped_and_others_left_where_they_are():
    """Without swaps, balance is had from finer chunks only, and by dealing documents out over all ranks."""
    plan = make_plan("balanced", 8192 * 64, 64, causal=True, cu_seqlens=packed("log-normal", 8192 * 64))
    assert plan.balance > 1 / 1.02
    assert plan.keys_needed.sum() - plan.keys_needed.trace() < 4 * plan.layout.seq_len


def test_lengths_that_do_not_divide():
    for seq_len, ranks in itertools.product((1000, 4099, 100_003), (3, 7)):
        plan = make_plan("balanced", seq_len, ranks, causal=True, cu_seqlens=packed("log-normal", seq_len, 1))
        assert sum(plan.layout.lengths) == seq_len
        assert max(plan.layout.lengths) - min(plan.layout.lengths) <= 32
    assert make_layout("balanced", 0, 3).lengths == (0, 0, 0)


def test_padding_weighs_nothing():
    """The second half is padding: every rank gets as many tokens, and a fair share of the work."""
    plan = make_plan("balanced", 1 << 16, 4, causal=True, cu_seqlens=[0, 1 << 15])
    assert plan.balance > 1 / 1.03
    assert set(plan.layout.lengths) == {1 << 14}


def test_a_million_tokens_of_65536_documents_on_64_ranks_are_planned_quickly():
    """Some 15 ms of an idle core. The best of some tries, and room for a machine that does other things."""
    seconds = []
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, 31, 1 << 16)
        cu_seqlens = np.minimum(np.concatenate(([0], np.cumsum(lengths))), 1 << 20)
        begin = time.process_time()
        plan = make_plan("balanced", 1 << 20, 64, causal=True, cu_seqlens=Documents(cu_seqlens))
        plan.reach(0)
        for other in range(64):
            plan.segments(3, other)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.1
