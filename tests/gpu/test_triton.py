"""Our own kernels on a GPU against fp64, at most twice (gradients: three times) as far from it as torch's
FlashAttention-2 on the same inputs. `pytest -n 12` compiles in parallel.

Each case is one rank's part of a ring: a random layout, mask, number of ranks and length, or a random list of
segments; the keys come piece by piece, results merge, gradients add up, and fresh memory holds NaN.
"""

from __future__ import annotations

import fcntl
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ringattn.kernels.aten import AtenKernel
from ringattn.kernels.hopper import HopperKernel
from ringattn.kernels.interface import Capped, Kernel, accumulate_dtype, nothing_seen
from ringattn.kernels.merge import merge_
from ringattn.kernels.portable import TritonKernel
from ringattn.kernels.reference import ReferenceKernel, cap, head_group, visible_pairs
from ringattn.kernels.segments import Segment, Segments
from ringattn.launch.oracle import error
from ringattn.layout import LAYOUTS
from ringattn.plan import make_plan
from tests.kernels.test_kernels import cut

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
]

KERNELS: tuple[Kernel, ...] = (HopperKernel(), TritonKernel())
CASES = 10  # for each model
REPETITIONS = 1000


class Model(NamedTuple):
    heads: int
    groups: int
    d: int
    e: int
    dtype: torch.dtype


HALF = (torch.bfloat16, torch.float16)
MODELS = [
    *(Model(8, 2, 128, 128, dtype) for dtype in HALF),
    *(Model(4, 4, 64, 64, dtype) for dtype in HALF),
    *(Model(6, 1, 80, 80, dtype) for dtype in HALF),
    *(Model(6, 3, 96, 96, dtype) for dtype in HALF),
    *(Model(4, 2, 256, 256, dtype) for dtype in HALF),
    *(Model(4, 1, 32, 32, dtype) for dtype in HALF),
    Model(4, 2, 192, 128, torch.bfloat16),
    Model(4, 4, 64, 128, torch.float16),
    Model(2, 1, 40, 72, torch.bfloat16),
    Model(4, 2, 128, 128, torch.float32),
    Model(4, 4, 64, 64, torch.float32),
    Model(2, 1, 80, 32, torch.float32),
    Model(2, 2, 256, 256, torch.float32),
    Model(32, 8, 128, 128, torch.bfloat16),
    Model(5, 5, 128, 64, torch.bfloat16),
    Model(3, 3, 48, 48, torch.float16),
    Model(6, 2, 64, 64, torch.bfloat16),
    Model(3, 1, 128, 128, torch.bfloat16),
    Model(32, 1, 128, 128, torch.float16),
]
CAPPED_MODELS = [Model(8, 2, 128, 128, dtype) for dtype in (*HALF, torch.float32)]


class Piece(NamedTuple):
    """Keys and values as they come round the ring, and what of them is visible."""

    k: Tensor
    v: Tensor
    segments: Segments


class RoundedKernel(ReferenceKernel):
    """The specification, with P and dS rounded to the inputs' dtype, as FlashAttention-2 does before their products:
    the baseline for what torch's own kernel does not take."""

    def forward(self, q, k, v, segments, *, scale, running=None, out_dtype=None, softcap=0.0):
        visible = visible_pairs(segments, q.shape[1], k.shape[1], q.device)
        groups = k.shape[2]
        outs, lses = [], []
        for g in range(groups):
            q_BRLD, k_B1MD, v_B1ME = (head_group(x, g, groups) for x in (q, k, v))
            scores = cap(q_BRLD @ k_B1MD.mT * scale, softcap).masked_fill(~visible, -torch.inf)
            top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
            p = (scores - top).exp()
            total = p.sum(-1, keepdim=True)
            outs.append((p.to(q.dtype).to(p.dtype) @ v_B1ME / total).nan_to_num(0.0))
            lses.append((top + total.log()).squeeze(-1))
        out, lse = running or nothing_seen(q, v)
        merge_(out, lse, torch.cat(outs, 1).transpose(1, 2), torch.cat(lses, 1))
        return out.to(out_dtype or out.dtype), lse

    def backward(
        self, dout, q, k, v, out, lse, delta, segments, *, scale, dq=None, dk=None, dv=None, out_dtype=None, softcap=0.0
    ):
        visible = visible_pairs(segments, q.shape[1], k.shape[1], q.device)
        groups = k.shape[2]
        parts: list[list[Tensor]] = [[], [], []]
        for g, (lse_BRL, delta_BRL) in enumerate(zip(lse.chunk(groups, 1), delta.chunk(groups, 1), strict=True)):
            q_BRLD, dout_BRLE, k_B1MD, v_B1ME = (head_group(x, g, groups) for x in (q, dout, k, v))
            scores = cap(q_BRLD @ k_B1MD.mT * scale, softcap)
            p = (scores - lse_BRL.unsqueeze(-1)).masked_fill(~visible, -torch.inf).exp()
            ds = p * (dout_BRLE @ v_B1ME.mT - delta_BRL.unsqueeze(-1))
            if softcap:
                ds *= 1 - (scores / softcap) ** 2
            p, ds = (x.to(q.dtype).to(x.dtype) for x in (p, ds))
            parts[0].append(ds @ k_B1MD * scale)
            parts[1].append((ds.mT @ q_BRLD).sum(1, keepdim=True) * scale)
            parts[2].append((p.mT @ dout_BRLE).sum(1, keepdim=True))
        fresh = (torch.cat(x, 1).transpose(1, 2) for x in parts)
        return tuple(x if total is None else total.add_(x) for total, x in zip((dq, dk, dv), fresh, strict=True))


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def attend(kernel: Kernel, q: Tensor, dout: Tensor, pieces: list[Piece], scale: float) -> dict[str, Tensor]:
    """What one rank of a ring computes. The first piece's key gradients add to sums that are there."""
    running = None
    for i, (k, v, segments) in enumerate(pieces):
        dtype = q.dtype if i == len(pieces) - 1 else None
        running = kernel.forward(q, k, v, segments, scale=scale, running=running, out_dtype=dtype)
    assert running is not None
    out, lse = running
    result, dq = {"out": out, "lse": lse}, None
    delta = kernel.row_delta(dout, out)
    for i, (k, v, segments) in enumerate(pieces):
        sums = [x.new_zeros(x.shape, dtype=accumulate_dtype(x)) if i == 0 else None for x in (k, v)]
        dq, dk, dv = kernel.backward(
            dout, q, k, v, out, lse, delta, segments, scale=scale, dq=dq, dk=sums[0], dv=sums[1]
        )
        result |= {f"dk{i}": dk, f"dv{i}": dv}
    assert dq is not None
    return result | {"dq": dq}


def make_case(model: Model, seed: int) -> tuple[Tensor, Tensor, list[Piece], float]:
    draw, generator = random.Random(seed), torch.Generator("cuda").manual_seed(seed)
    batch = draw.choice([1, 1, 2, 3])

    def tensor(length: int, heads: int, width: int) -> Tensor:
        """Rows before heads, heads before rows, or a part of something larger."""
        order = draw.choice(["BLHD", "BHLD", "part"])
        size = (batch, heads, length, width) if order == "BHLD" else (batch, length, heads, width)
        if order == "part":
            size = (batch, length, heads + 1, 2 * width)
        x = torch.randn(size, device="cuda", generator=generator).to(model.dtype)
        return x.transpose(1, 2) if order == "BHLD" else x[:, :, :heads, :width]

    if draw.random() < 0.6:
        ranks = draw.randint(1, 5)
        seq_len = draw.randint(1, 400) * ranks + draw.randint(0, ranks - 1)
        mask: dict[str, Any] = {"causal": draw.random() < 0.7}
        if draw.random() < 0.3:
            mask["window_size"] = (draw.randint(-1, 300), draw.randint(-1, 300))
        if draw.random() < 0.3:
            mask["cu_seqlens"] = [0, *sorted(draw.randint(0, seq_len) for _ in range(draw.randint(0, 9)))]
        plan = make_plan(draw.choice(list(LAYOUTS)), seq_len, ranks, **mask)
        rank = draw.randrange(ranks)
        rows = plan.layout.lengths[rank]
        sources = [s for s in range(ranks) if plan.segments(rank, s)] or [rank]
        parts = [(plan.layout.lengths[s], plan.segments(rank, s)) for s in draw.sample(sources, len(sources))]
    else:
        rows = draw.randint(1, 700)
        lengths = [draw.randint(1, 700) for _ in range(draw.randint(1, 2))]
        parts = [(length, cut(rows, length, draw)) for length in lengths]
    q, dout = tensor(rows, model.heads, model.d), tensor(rows, model.heads, model.e)
    pieces = [
        Piece(tensor(length, model.groups, model.d), tensor(length, model.groups, model.e), segments)
        for length, segments in parts
    ]
    return q, dout, pieces, draw.choice([1.0, 2.0]) * model.d**-0.5


def takes(kernel: Kernel, model: Model) -> Kernel:
    """The kernel, unless it cannot run such a model here: then the test is skipped."""
    q, v = (torch.empty(1, 1, 1, width, dtype=model.dtype, device="cuda") for width in (model.d, model.e))
    if refusal := kernel.refuses(q, q, v):
        pytest.skip(f"{kernel.name}: {refusal}")
    return kernel


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_against_fp64(kernel: Kernel, model: Model):
    takes(kernel, model)
    for seed in range(CASES):
        hold_against_fp64(kernel, model, seed)


@pytest.mark.parametrize("softcap", [0.3, 2.0, 50.0])
@pytest.mark.parametrize("model", CAPPED_MODELS, ids=str)
def test_capped_scores(model: Model, softcap: float):
    for seed in range(CASES):
        hold_against_fp64(TritonKernel(), model, seed, softcap)


def hold_against_fp64(kernel: Kernel, model: Model, seed: int, softcap: float = 0.0) -> None:
    q, dout, pieces, scale = make_case(model, seed)
    refused = softcap or AtenKernel().refuses(q, pieces[0].k, pieces[0].v)
    baseline_kernel: Any = RoundedKernel() if refused else AtenKernel()
    oracle: Any = ReferenceKernel()
    # The first also asks for deterministic algorithms, and only the Hopper kernels have others.
    memories = (poisoned, nullcontext)[: 2 if kernel.name == "hopper" else 1]
    if softcap:
        kernel, baseline_kernel, oracle = (Capped(x, softcap) for x in (kernel, baseline_kernel, oracle))
    exact = [Piece(k.double(), v.double(), segments) for k, v, segments in pieces]
    expected = attend(oracle, q.double(), dout.double(), exact, scale)
    baseline = attend(baseline_kernel, q, dout, pieces, scale)
    for memory in memories:
        with memory():
            got = attend(kernel, q, dout, pieces, scale)
        for name, right in expected.items():
            seen = right != -torch.inf
            assert torch.equal(got[name] == -torch.inf, ~seen), f"seed {seed}: {name}"
            ours, theirs = (error(x[name][seen], right[seen]) for x in (got, baseline))
            allowed = (2 if name in ("out", "lse") else 3) * theirs + torch.finfo(torch.float32).eps
            assert ours <= allowed, f"seed {seed}: {name} errs {ours:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("model", [MODELS[0], MODELS[2]], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_bit_equal_from_run_to_run(kernel: Kernel, model: Model, deterministic: bool):
    takes(kernel, model)
    any_order = {"dq"} if kernel.name == "hopper" and not deterministic else set()
    q, dout, pieces, scale = make_case(model, 3)
    with poisoned() if deterministic else nullcontext():
        first = attend(kernel, q, dout, pieces, scale)
        for _ in range(REPETITIONS):
            again = attend(kernel, q, dout, pieces, scale)
            assert all(torch.equal(again[name], x) for name, x in first.items() if name not in any_order)


@pytest.fixture
def most_of_the_memory(tmp_path_factory) -> Iterator[None]:
    """One test at a time: workers of `pytest -n` share the folder above their own."""
    with (tmp_path_factory.getbasetemp().parent / "memory.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield
        torch.cuda.empty_cache()


@pytest.mark.usefixtures("most_of_the_memory")
@pytest.mark.parametrize("copies_of", ["queries", "keys"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_more_than_two_to_the_31_elements(kernel: Kernel, copies_of: str):
    """Copies of the same queries get the same answer; among n copies of the same keys each weighs 1/n."""
    takes(kernel, MODELS[0])
    copies, length, heads, width = 2100, 1000, 8, 128
    q, k, v, dout = torch.randn(4, 1, length, heads, width, device="cuda", dtype=torch.bfloat16).unbind()
    expected = attend(ReferenceKernel(), q.double(), dout.double(), [whole(k.double(), v.double(), length)], 0.1)
    if copies_of == "queries":
        q, dout = (x.repeat(1, copies, 1, 1) for x in (q, dout))
        weight = copies
    else:
        k, v = (x.repeat(1, copies, 1, 1) for x in (k, v))
        weight = 1 / copies
    assert max(q.numel(), k.numel()) > 1 << 31
    with poisoned():
        got = attend(kernel, q, dout, [whole(k, v, q.shape[1])], 0.1)
    for name, factor in {"out": 1, "dq": 1, "dk0": weight, "dv0": weight}.items():
        for copy in (got[name][:, :length], got[name][:, -length:]):
            assert ((copy / factor - expected[name]).norm() / expected[name].norm()).item() < 0.02, name
        assert got[name].isfinite().all(), name


def whole(k: Tensor, v: Tensor, rows: int) -> Piece:
    return Piece(k, v, Segments([Segment(0, rows, 0, k.shape[1], k.shape[1])]))
