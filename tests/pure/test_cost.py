"""The cost model: choices that follow from its rates, the same on every rank, within the budget, and printed."""

import pytest

from ringattn.cost import ALIKE, MEMORY_SHARE, Workload, choose_executor, predict, round_the_ring
from ringattn.launch.packing import packed
from ringattn.plan import make_plan
from ringattn.rates import LINKS, seconds


def workload(tokens: int, ranks: int, **changed) -> Workload:
    plan = make_plan("zigzag", tokens * ranks, ranks, causal=True)
    given = {
        "same_node": True,
        "memory": 141 * 10**9,
        "kernel": "triton",
        "waits": False,
        "delivers": False,
    } | changed
    return Workload(plan, batch=1, q_heads=32, kv_heads=8, head_dim=128, v_head_dim=128, itemsize=2, **given)


def test_links_take_longer_for_more():
    for link in LINKS:
        times = [seconds(link, 2.0**n) for n in range(10, 34)]
        assert times == sorted(times)
    assert seconds("p2p", 0) == 0


@pytest.mark.parametrize("tokens", [512, 2048, 8192, 32768])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_choice_is_among_the_least_predictions_the_smallest(tokens, ranks):
    load = workload(tokens, ranks)
    choice = choose_executor("auto", load)
    least = min(prediction.total for prediction in predict(load))
    alike = [prediction for prediction in predict(load) if prediction.total <= least * (1 + ALIKE)]
    best = next(prediction for prediction in alike if prediction[:2] == (choice.executor, choice.schedule))
    assert best.memory == min(prediction.memory for prediction in alike)
    for named in ("ring", "gather", "pull"):
        assert choose_executor(named, load).executor == named


def test_one_launch_where_the_kernel_waits_and_delivers():
    for tokens in (2048, 8192, 32768):
        load = workload(tokens, 2, kernel="hopper", waits=True, delivers=True)
        assert choose_executor("auto", load).schedule[:2] == (True, True)
        assert not choose_executor("auto", load._replace(delivers=False)).schedule.at_once


def test_the_longest_tile_of_a_backward():
    """All rows of a rank see its keys; or those of the longest document, or as many as see one within a window."""
    load = workload(8192, 2)
    documents = make_plan("balanced", 16384, 2, causal=True, cu_seqlens=[0, 4096, 12288, 16384])
    window = make_plan("contiguous", 16384, 2, causal=True, window_size=(1023 - 128, 0))
    times = [load._replace(plan=plan).longest_tile(0) for plan in (load.plan, documents, window)]
    assert times == pytest.approx([times[0], times[0], times[0] / 8192 * 1023], rel=1e-3)
    halved = make_plan("balanced", 16384, 2, causal=True, cu_seqlens=range(0, 16385, 4096))
    assert load._replace(plan=halved).longest_tile(0) == times[0] / 2
    assert load.launched(0, 0.0) == 0
    shared, alone = load.launched(0, 1e-9), load._replace(q_heads=24).launched(0, 1e-9)  # three heads a group
    assert shared == pytest.approx(times[0] / 2 + load.launched(0, 10.0) - 10)
    assert alone > 3 / 4 * times[0]


def test_where_memory_is_short_the_ring_is_left():
    load = workload(32768, 8, memory=16 * 10**9)
    choice = choose_executor("auto", load)
    assert choice.executor == "ring"
    assert choice.predictions[0].memory > 16e9 * MEMORY_SHARE
    assert "within" in str(choice)


def test_ranks_of_a_ring_wait_for_each_other_where_documents_are_packed():
    """As much work for all in all, but not at each step."""
    ranks, tokens = 64, 8192 * 64

    def excess(plan):
        steps = [[float(plan.work[rank, (rank - t) % ranks]) for t in range(ranks)] for rank in range(ranks)]
        return round_the_ring(steps) / (plan.work.sum() / ranks)

    documents = make_plan("balanced", tokens, ranks, causal=True, cu_seqlens=packed("log-normal", tokens))
    assert documents.balance > 0.97
    assert excess(documents) > 2
    assert excess(make_plan("balanced", tokens, ranks, causal=True)) < 1.01


def test_pull_needs_one_node():
    load = workload(8192, 4, same_node=False)
    assert choose_executor("auto", load).executor != "pull"
    with pytest.raises(NotImplementedError, match="executor='pull' needs ranks on one node"):
        choose_executor("pull", load)


def test_longer_sequences_scale_better():
    """Predicted efficiency, one GPU's time over P times ours, rises with the length and stays below one."""
    efficiency = []
    for tokens in (1024, 4096, 16384, 65536):
        load = workload(tokens, 4)
        alone = sum(load.compute(0, source) for source in range(4))
        efficiency.append(alone / choose_executor("auto", load).predictions[0].forward)
    assert efficiency == sorted(efficiency)
    assert efficiency[-1] < 1


def test_on_a_device_without_rates_the_ring_is_left():
    assert choose_executor("auto", workload(64, 2, memory=0, same_node=False)).executor == "ring"
