"""Packed documents, windows, sinks and capped scores on real ranks, through the public face."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import ringattn
from ringattn.launch.oracle import Case
from ringattn.launch.packing import log_normal_lengths
from ringattn.layout import LAYOUTS
from ringattn.mask import Mask
from ringattn.ranks import group_name, ranks_named
from tests.dense import dense_attention, visible
from tests.gang import run_ranks
from tests.ranks.test_attention import check_case

MASKS = ({"window": 1}, {"window": 40}, {"documents": 7}, {"documents": 100})
DTYPES = (torch.float32, torch.bfloat16)
CASES = list(itertools.product(LAYOUTS, MASKS, [(4, 4), (8, 2)], (1031, 96, 7), (1, 2), DTYPES))


def check_cases(rank: int, cases: list, device: str = "cpu", executor: str = "auto") -> None:
    for layout, mask, (q_heads, kv_heads), seq_len, batch, dtype in cases:
        case = Case(seq_len, batch, q_heads, kv_heads, 16, dtype=dtype, window=mask.get("window"))
        if "documents" in mask:
            lengths = log_normal_lengths(np.random.default_rng(seq_len), seq_len, mask["documents"], seq_len, 1.0)
            case = case._replace(documents=(0, *np.cumsum(lengths).tolist()))
        check_case(rank, case, layout, device, executor)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equal_to_one_rank(ranks):
    run_ranks(ranks, check_cases, random.Random(ranks).sample(CASES, 15))


def everything_at_once(rank: int, ranks: int, executor: str) -> None:
    """Documents, a window, sinks and a cap; two layers of different masks in one layout; out and lse differentiated."""
    seq_len, cu_seqlens = 150, torch.tensor([0, 3, 90, 90, 131])
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, seq_len, heads, 8) for heads in (4, 2, 2)] + [(4,)]
    q, k, v, sinks = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    options: dict[str, Any] = {"causal": True, "softcap": 3.0, "softmax_scale": 0.3}
    tokens = torch.arange(seq_len)

    def loss(outs, lses):
        told = [lse[lse != -torch.inf].sin().sum() for lse in lses]
        return torch.stack([out.square().sum() for out in outs] + told).sum()

    seen = [visible(tokens, tokens, True, window, cu_seqlens.tolist()) for window in ((-1, -1), (10, 0))]
    expected = [dense_attention(q, k, v, each, 0.3, sinks, 3.0) for each in seen]
    grads = torch.autograd.grad(loss(*zip(*expected, strict=True)), (q, k, v, sinks))

    cp = ringattn.ContextParallel(layout="balanced", executor=executor)
    mine = [cp.shard(x.detach(), cu_seqlens=cu_seqlens).requires_grad_() for x in (q, k, v)]
    options |= {"cu_seqlens": cu_seqlens, "seq_len": seq_len, "sinks": sinks, "return_lse": True}
    got = [cp.attention(*mine, window_size=window, **options) for window in (None, 11)]
    *dqkv, dsinks = torch.autograd.grad(loss(*zip(*got, strict=True)), (*mine, sinks))
    if ranks > 1:
        dist.all_reduce(dsinks)
    for x, right, dim in (
        *((out, right, 1) for (out, _), (right, _) in zip(got, expected, strict=True)),
        *((lse, right, 2) for (_, lse), (_, right) in zip(got, expected, strict=True)),
        *((grad, right, 1) for grad, right in zip(dqkv, grads, strict=False)),
    ):
        whole = cp.unshard(x.detach(), dim, seq_len=seq_len, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(whole, right.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dsinks, grads[3], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("ranks", "executor"), [(1, "ring"), (3, "ring"), (3, "gather")])
def test_everything_at_once(ranks, executor):
    run_ranks(ranks, everything_at_once, ranks, executor)


def tokens_follow_the_plan(rank: int) -> None:
    """Positions, labels, loss weights and embeddings are cut alike, and come back."""
    seq_len, cu_seqlens = 4096, [0, 700, 701, 3000, 4000]
    cp = ringattn.ContextParallel(layout="balanced")
    ids = torch.arange(seq_len).view(1, -1)
    parts = {
        "ids": ids,
        "labels": ringattn.next_token_labels(ids, cu_seqlens),
        "weights": torch.rand(1, seq_len, generator=torch.Generator().manual_seed(0)),
    }
    cut = {name: cp.shard(x, cu_seqlens=cu_seqlens) for name, x in parts.items()}
    for name, x in parts.items():
        assert torch.equal(cp.unshard(cut[name], seq_len=seq_len, cu_seqlens=cu_seqlens), x), name
    mine = cut["ids"][0]
    assert torch.equal(cp.positions(seq_len, cu_seqlens=cu_seqlens), ringattn.Documents(cu_seqlens).positions(mine))
    labelled = cut["labels"][0] != -100
    assert torch.equal(cut["labels"][0][labelled], mine[labelled] + 1)
    ends = torch.tensor([700, 701, 3000, 4000]) - 1
    assert (torch.isin(mine, ends) | (mine >= 4000)).equal(~labelled)
    assert cp.plan(seq_len, causal=True, cu_seqlens=cu_seqlens).balance > 1 / 1.03


def test_everything_follows_the_plan():
    run_ranks(3, tokens_follow_the_plan)


def new_documents_every_step(rank: int) -> None:
    """One graph serves all documents of a length; ranks agree on each anew, and recomputation runs no ring."""
    cp = ringattn.ContextParallel(layout="contiguous")
    q, k, v = (torch.randn(1, 6, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    ranks = ranks_named(group_name(None))

    def block(q, k, v, sinks, cu_seqlens):
        return cp.attention(q * 2, k, v, causal=True, window_size=4, sinks=sinks, cu_seqlens=cu_seqlens).square().sum()

    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for cuts in ([0, 5, 12], [0, 1, 12], [0, 7, 12]):
        cu_seqlens, leaves = torch.tensor(cuts), (q, k, v, sinks)
        expected = torch.autograd.grad(block(*leaves, cu_seqlens), leaves)
        before = ranks.calls
        step = checkpoint(compiled, *leaves, cu_seqlens, use_reentrant=False, context_fn=ringattn.keep_attention)
        got = torch.autograd.grad(step, leaves)
        assert ranks.calls - before == 2
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(graphs) == 1
    assert len(ranks.agreed) == 3


def test_new_documents_do_not_compile_anew():
    run_ranks(2, new_documents_every_step)


def test_a_balance_with_documents_is_refused():
    with pytest.raises(ValueError, match="pass cu_seqlens with each"):
        ringattn.ContextParallel(balance=Mask(documents=ringattn.Documents([0, 3])))


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (torch.zeros(3), r"got sinks \(3,\) of torch.float32 for 2 query heads"),
        (torch.zeros(2, dtype=torch.int64), "pass a logit per query head"),
    ],
)
def test_sinks_that_do_not_fit_raise(sinks, message):
    with pytest.raises(ValueError, match=message):
        ringattn.ring_attention(*torch.zeros(3, 1, 4, 2, 8), sinks=sinks)


@pytest.mark.parametrize("softcap", [-1.0, float("nan"), float("inf")])
def test_caps_that_are_none_raise(softcap):
    with pytest.raises(ValueError, match="pass a positive number, or 0 for no cap"):
        ringattn.ring_attention(*torch.zeros(3, 1, 4, 2, 8), softcap=softcap)


def test_wrong_documents_are_refused_after_right_ones():
    x = torch.zeros(1, 4, 1, 8)
    ringattn.ring_attention(x, x, x)
    for wrong in ([0, 3, 2], [0, 9]):
        with pytest.raises(ValueError, match="got cu_seqlens"):
            ringattn.ring_attention(x, x, x, cu_seqlens=wrong)
