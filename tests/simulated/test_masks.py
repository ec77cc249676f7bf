"""Packed documents, windows, sinks and capped scores in any mix, on rings of 1 to 8, against the whole matrix."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringattn import balance
from ringattn.executors import pull
from ringattn.executors.call import Buffers, Call
from ringattn.executors.home import delta_of
from ringattn.kernels.registry import choose_kernel
from ringattn.layout import LAYOUTS
from ringattn.plan import make_plan
from ringattn.sinks import seen_by_sinks, sink_gradients
from ringattn.transport.simulated import simulate
from tests.dense import dense_attention, visible
from tests.simulated.test_executors import EXECUTORS


class Mix(NamedTuple):
    """One attention with everything that may shape it."""

    seq_len: int
    ranks: int
    layout: str
    causal: bool
    window: tuple[int, int]
    cu_seqlens: list[int] | None
    sinks: bool
    softcap: float
    heads: tuple[int, int]
    executor: str
    seed: int


@st.composite
def mixes(draw: st.DrawFn) -> Mix:
    seq_len = draw(st.integers(0, 70))
    cuts = st.lists(st.integers(0, seq_len), max_size=8).map(lambda cuts: sorted([0, *cuts]))
    side = st.sampled_from([-1, -1, 0, 1, 3, 20])
    return Mix(
        seq_len,
        draw(st.integers(1, 8)),
        draw(st.sampled_from(list(LAYOUTS))),
        draw(st.booleans()),
        (draw(side), draw(side)),
        draw(st.none() | cuts | cuts.map(lambda cuts: [*cuts, seq_len])),
        draw(st.booleans()),
        draw(st.sampled_from([0.0, 0.0, 0.5, 5.0])),
        draw(st.sampled_from([(2, 2), (2, 1), (4, 2)])),
        draw(st.sampled_from(list(EXECUTORS))),
        draw(st.integers(0, 1000)),
    )


@pytest.fixture(autouse=True, scope="module")
def short_chunks():
    """Chunks of the balanced layout as short as these sequences."""
    shortest, balance.SHORTEST = balance.SHORTEST, 1
    yield
    balance.SHORTEST = shortest


def inputs_of(mix: Mix, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v, dout, dlse and sinks of the whole sequence."""
    generator = torch.Generator().manual_seed(mix.seed)
    h, g = mix.heads
    shapes = [(1, mix.seq_len, n, 8) for n in (h, g, g, h)] + [(1, h, mix.seq_len), (h,)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def across_ranks(mix: Mix, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv of the whole sequence and the gradient of the sinks."""
    plan = make_plan(
        mix.layout, mix.seq_len, mix.ranks, causal=mix.causal, window_size=mix.window, cu_seqlens=mix.cu_seqlens
    )
    *whole, dlse_BHS, sinks = inputs
    module, schedule = EXECUTORS[mix.executor]

    def work(rank, transport):
        q, k, v, dout = (plan.layout.shard(x, rank, 1) for x in whole)
        dlse = plan.layout.shard(dlse_BHS, rank, 2)
        kernel = choose_kernel("reference", q, k, v, softcap=mix.softcap).kernel
        symmetric = transport if module is pull else None
        call = Call(plan, rank, kernel, 0.3, transport, Buffers(), symmetric, schedule)
        out, lse = module.forward(call, q, k, v, seen_by_sinks(sinks, q, v) if mix.sinks else None)
        grads = module.backward(call, dout, q, k, v, out, lse, dlse)
        delta = delta_of(kernel, dout, out, dlse)
        return out, lse, *grads, sink_gradients(sinks, lse, delta) if mix.sinks else torch.zeros_like(sinks)

    out, lse, dq, dk, dv, dsinks = zip(*simulate(plan.ranks, work), strict=True)
    whole = [plan.layout.unshard(parts, 1) for parts in (out, dq, dk, dv)]
    return whole[0], plan.layout.unshard(lse, 2), *whole[1:], torch.stack(dsinks).sum(0)


def dense(mix: Mix, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    q, k, v, dout, dlse, sinks = (x.clone().requires_grad_() for x in inputs)
    tokens = torch.arange(mix.seq_len)
    seen = visible(tokens, tokens, mix.causal, mix.window, mix.cu_seqlens)
    out, lse = dense_attention(q, k, v, seen, 0.3, sinks if mix.sinks else None, mix.softcap)
    told = lse != -torch.inf
    loss = (out * dout.detach()).sum() + (lse[told] * dlse.detach()[told]).sum()
    grads = torch.autograd.grad(loss, (q, k, v, sinks), allow_unused=True, materialize_grads=True)
    return out.detach(), lse.detach(), *grads


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(mixes())
@example(Mix(64, 4, "balanced", True, (-1, -1), [0, 1, 1, 40, 41, 64], True, 5.0, (4, 2), "gather by head groups", 0))
@example(Mix(64, 8, "contiguous", True, (4, 0), [0, 10], True, 0.0, (2, 1), "ring", 0))  # ranks that hold only padding
@example(Mix(64, 4, "zigzag", False, (-1, 2), [0, 0, 64], False, 0.0, (2, 2), "pull", 0))
def test_any_mix_equals_the_whole_matrix(mix: Mix):
    inputs = inputs_of(mix)
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    for name, got, right in zip(names, across_ranks(mix, inputs), dense(mix, inputs), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mixes(), st.integers(0, 7))
def test_documents_never_leak(mix: Mix, which: int):
    """Other inputs in one document change no other document's output or gradient by a single bit."""
    cu_seqlens = [*(mix.cu_seqlens or [0, mix.seq_len // 3]), mix.seq_len]
    mix = mix._replace(cu_seqlens=cu_seqlens)
    start, end = list(itertools.pairwise(cu_seqlens))[which % (len(cu_seqlens) - 1)]
    inputs = inputs_of(mix, torch.float32)
    changed = tuple(x.clone() for x in inputs)
    for x in changed[:4]:
        x[:, start:end] = 1e4
    others = torch.tensor([t for t in range(mix.seq_len) if not start <= t < end], dtype=torch.int64)
    before, after = across_ranks(mix, inputs), across_ranks(mix, changed)
    for name, x, y, dim in zip(("out", "lse", "dq", "dk", "dv"), before, after, (1, 2, 1, 1, 1), strict=False):
        assert torch.equal(x.index_select(dim, others), y.index_select(dim, others)), name
