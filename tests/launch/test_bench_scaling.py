"""Attention across ranks, measured: what it is compared with, and the command."""

import pytest
import torch

from ringattn.kernels.registry import KERNELS
from ringattn.launch.benchmarks import ranks, scaling
from ringattn.launch.benchmarks.across import OursAcross, Share, busiest, cut
from ringattn.launch.benchmarks.baselines import AllGather, Ulysses
from ringattn.launch.benchmarks.cases import named_case
from ringattn.launch.benchmarks.contest import over_ranks
from ringattn.launch.oracle import Inputs, attend_on_one_rank, make_inputs
from ringattn.layout import LAYOUTS
from ringattn.plan import make_plan
from tests.gang import run_ranks

CPU = torch.device("cpu")


def test_the_slowest_rank_counts():
    ranks = [
        {"ahead": [1.0, 5.0], "synchronised": [3.0], "gib": 0.5, "mhz": 1400.0, "expects": {}},
        {"ahead": [2.0, 4.0], "synchronised": [2.0], "gib": 0.75, "mhz": 1500.0, "expects": {}},
    ]
    slowest = {"ahead": [2.0, 5.0], "synchronised": [3.0], "gib": 0.75, "mhz": 1400.0, "expects": {}}
    assert over_ranks(ranks) == slowest


def peers_without_a_gpu(rank):
    """What is computed by those that run here, in the other mask too, held against one rank."""
    case = named_case("2/4:2/16/48/none", torch.float32)
    inputs = make_inputs(case, 0)
    right = attend_on_one_rank(KERNELS["aten"], case, inputs)
    for each in (Ulysses("aten"), AllGather("aten", False)):
        x = cut(each, inputs, case, rank, 2)
        q, k, v = (tensor.requires_grad_() for tensor in x[:3])
        with each.ready(case, CPU):
            out = each.attend(q, k, v, case)
        for got, expected in zip((out, *torch.autograd.grad(out, (q, k, v), x.dout)), right, strict=True):
            torch.testing.assert_close(got, expected[:, 24 * rank : 24 * (rank + 1)], atol=1e-5, rtol=1e-5)


def test_the_baselines_compute_without_a_mask_too():
    run_ranks(2, peers_without_a_gpu)


def test_the_busiest_rank_of_a_plan_counts():
    case = named_case("1/2:2/8/64/causal", torch.float32)
    assert busiest(Ulysses("aten").local, case, 4) == 1 / 4
    assert busiest(OursAcross("aten", "ring", "zigzag").local, case, 4) == pytest.approx(1 / 4)
    assert busiest(OursAcross("aten", "ring", "contiguous").local, case, 2) == pytest.approx(3 / 4, rel=0.01)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_a_share_of_the_work_is_what_the_ring_computes(layout):
    """The same pairs, in one call; with keys in rank order, the same output."""
    case = named_case("1/2:1/8/30/causal", torch.float64)
    inputs = make_inputs(case, 0)
    plan = make_plan(layout, 30, 3, causal=True)
    right = attend_on_one_rank(KERNELS["reference"], case, inputs)
    order = torch.cat([plan.layout.positions(rank) for rank in range(3)])
    for rank in range(3):
        assert sum(segment.pairs for segment in plan.gathered_segments(rank)) == plan.pairs(rank)
        share = Share(OursAcross("reference", "ring", layout).local, rank, 3)
        x = share.prepare(inputs, case)
        x = Inputs(x.q, inputs.k[:, order], inputs.v[:, order], x.dout)
        out = share.forward(x, case)[0]
        torch.testing.assert_close(out, right.out[:, plan.layout.positions(rank)])


def test_one_thing_at_a_time_is_changed_unless_all_is_asked_for(monkeypatch):
    monkeypatch.setattr(ranks, "NAMED_EXECUTORS", ("ring", "pull", "auto"))
    ways = {"aten-pull-zigzag", "aten-auto-zigzag", *(f"aten-ring-{layout}" for layout in LAYOUTS)}
    ways |= {f"{name}-ring-zigzag" for name in KERNELS if name != "reference"}
    assert ranks.standard("aten") == {f"ringattn-{way}" for way in ways}
    assert [each.name for each in scaling.ScalingBench(implementations=["ul*", "*-aten-ring-*"]).chosen(CPU)] == [
        "ulysses",
        *(f"ringattn-aten-ring-{layout}" for layout in LAYOUTS),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [0]}, "tokens=\\[0\\]: expected numbers of at least 1"),
        ({"kv_heads": 3}, "kv_heads=3: expected a divisor of q_heads=32"),
        ({"implementations": ["ringattn-fast"]}, "expected one of ringattn-"),
        ({"passes": ["backward"]}, "passes=backward: expected one of forward, forward\\+backward"),
        ({"peer_kernel": "fa3"}, "peer_kernel=fa3"),
    ],
)
def test_wrong_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scaling.ScalingBench(**options)
