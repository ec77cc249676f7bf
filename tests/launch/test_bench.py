"""Benches: only what is right gets a figure, and everything else is named with its reason."""

import os
import time
from itertools import pairwise

import pytest
import torch

from ringattn.kernels.aten import AtenKernel
from ringattn.launch.benchmarks import implementations, kernel, local, masks, truth
from ringattn.launch.benchmarks.cases import PASSES, describe, named_case, tera_operations
from ringattn.launch.benchmarks.truth import Truth, one_head
from ringattn.launch.oracle import Case, Result, attend_on_one_rank, make_inputs
from tests.launch.jobs import Soon

CPU = torch.device("cpu")
TOY = "2/4:2/16/100/causal"
FIELDS = {
    *("date", "commit", "gpu", "gpus", "torch", "triton", "run", "bench", "impl"),
    *("batch", "q_heads", "kv_heads", "seq_len", "head_dim", "mask", "dtype", "pass"),
    *("median_ms", "tflops_per_gpu", "efficiency", "peak_memory_gib"),
    *("dirty", "driver", "ringattn", "min_ms", "max_ms"),
}


class Slightly(implementations.Ours):
    """Right, but for a part of one gradient."""

    def __init__(self):
        super().__init__("aten")
        self.name = "wrong"

    def backward(self, x, saved, case):
        dq, dk, dv = super().backward(x, saved, case)
        return dq, dk * 1.001, dv


class Unfinished(Slightly):
    def forward(self, x, case):
        saved = super().forward(x, case)
        saved[0][0, -1, 0, -1] = torch.nan
        return saved


class Hanging(Slightly):
    def forward(self, x, case):
        time.sleep(60)


class Dying(Slightly):
    def forward(self, x, case):
        os._exit(7)


class Refusing(Slightly):
    def refuses(self, x, case):
        return "it is Sunday"


def measure(*entrants, cases=(TOY,), **options):
    settings = kernel.KernelBench(cases=list(cases), dtype="fp32", rounds=1, budget_ms=1, **options)
    return [
        each for found in kernel.measure(list(entrants), settings.named_cases(CPU), settings, CPU) for each in found
    ]


def test_a_figure_for_each_pass_in_exactly_these_fields():
    entrants = implementations.Ours("aten"), implementations.TorchMath()
    records = measure(*entrants, cases=[TOY, "1/2:2/8/33/none"], passes=list(PASSES))
    assert [(each["impl"], each["seq_len"], each["pass"]) for each in records] == [
        (name, length, which)
        for length in (100, 33)
        for name in ("ringattn-aten", "torch-math")
        for which in ("forward", "backward", "forward+backward")
    ]
    for each in records:
        assert set(each) == FIELDS
        assert 0 < each["min_ms"] <= each["median_ms"] <= each["max_ms"]
    first = records[0]
    assert (first["bench"], first["mask"], first["dtype"], first["head_dim"]) == ("kernel", "causal", "fp32", 16)
    assert first["tflops_per_gpu"] == pytest.approx(2 * 2 * 2 * 4 * 16 * 100**2 / 2 / first["median_ms"] / 1e9)
    assert len({each["run"] for each in records}) == 1


@pytest.mark.parametrize(
    ("entrant", "reason"),
    [
        (Slightly(), "wrong: dk errs"),
        (Unfinished(), "ValueError: out holds values that are not finite"),
        (Dying(), "its process died with exit code 7"),
        (Refusing(), "it is Sunday"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_figure_without_a_right_result(capsys, entrant, reason):
    records = measure(entrant, implementations.Ours("aten"), cases=[TOY, TOY], passes=["forward"], patience=60)
    assert [each["impl"] for each in records] == ["ringattn-aten"] * 2
    assert capsys.readouterr().out.count(f"{TOY}: no figure for wrong: {reason}") == 2


def test_who_hangs_is_ended(capsys):
    began = time.monotonic()
    assert not measure(Hanging(), patience=2)
    assert time.monotonic() - began < 30
    assert f"{TOY}: no figure for wrong: no answer within 2 s" in capsys.readouterr().out


def test_nothing_is_begun_after_the_deadline(capsys):
    assert not measure(implementations.Ours("aten"), cases=[TOY], deadline=0.0)
    assert f"{TOY}: not measured: the deadline passed" in capsys.readouterr().out


def test_what_was_measured_before_the_deadline_is_kept(capsys, monkeypatch):
    monkeypatch.setattr(kernel, "Deadline", Soon)
    (record,) = measure(implementations.Ours("aten"), passes=["forward", "backward"])
    (missing,) = {"forward", "backward"} - {record["pass"]}
    assert f"{TOY}: no figure for ringattn-aten, {missing}: the deadline passed" in capsys.readouterr().out


def test_patterns_choose_and_a_kernel_with_a_choice_of_orders_appears_in_both_ways(monkeypatch):
    class Ordered(AtenKernel):
        used = 0

        def backward(self, *arguments, **options):
            Ordered.used += 1
            return super().backward(*arguments, **options)

    class Switched(AtenKernel):
        def ordered(self, deterministic: bool) -> AtenKernel:
            assert deterministic
            return Ordered()

    monkeypatch.setitem(implementations.KERNELS, "swift", Switched())
    names = [each.name for each in kernel.KernelBench(implementations=["*swift*", "*-swift"]).chosen(CPU)]
    assert names == ["ringattn-swift", "ringattn-swift-deterministic"]
    everybody = [[each.name for each in kernel.KernelBench().chosen(torch.device(kind))] for kind in ("cpu", "cuda")]
    assert [("ringattn-aten" in some, "torch-fa2" in some) for some in everybody] == [(True, True), (False, True)]
    each, case = implementations.local_implementations()[names[1]], named_case(TOY, torch.float32)
    x = make_inputs(case, 0)
    assert len(each.backward(x, each.forward(x, case), case)) == 3
    assert Ordered.used == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_the_truth_lets_torchs_kernel_pass_and_no_damage(dtype, causal):
    case = Case(257, 2, 4, 2, 32, causal, dtype)
    inputs = make_inputs(case, 0)
    truth = Truth(case, inputs, batch=1, group=1)
    result = attend_on_one_rank(AtenKernel(), case, inputs)
    assert not truth.faults(one_head(result, 1, 1, 2))
    assert set(truth.faults(one_head(result, 1, 0, 2))) == {"out", "dq", "dk", "dv"}
    for part in range(4):
        damaged = one_head(result, 1, 1, 2)
        damaged[part] = damaged[part].clone()
        damaged[part][:, -16:] = 0
        assert len(truth.faults(damaged)) == 1


def test_the_truth_in_pieces_is_the_same(monkeypatch):
    case = Case(50, 1, 2, 1, 8)
    whole = truth.Truth(case, make_inputs(case, 0), 0, 0).right
    monkeypatch.setattr(truth, "MATRIX_BYTES", 2 * 50 * 8 * 7)  # seven rows at a time
    torch.testing.assert_close(truth.Truth(case, make_inputs(case, 0), 0, 0).right, whole)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("documents", [None, (0, 1, 20, 44, 50)])
def test_the_truth_of_windows_and_documents(monkeypatch, window, documents):
    """Against one dense softmax, with a mask written out from the definition."""
    monkeypatch.setattr(truth, "MATRIX_BYTES", 2 * 50 * 8 * 7)
    case = Case(50, 1, 2, 1, 8, window=window, documents=documents)
    inputs = make_inputs(case, 0)
    q, k, v, dout = (x.transpose(1, 2).clone().requires_grad_() for x in inputs)
    place = range(50)
    document = [sum(start <= i for start in documents or (0,)) for i in place]
    seen = [[j <= i and i - j < (window or 50) and document[i] == document[j] for j in place] for i in place]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, torch.tensor(seen), enable_gqa=True)
    right = Result(*(part.transpose(1, 2) for part in (out, *torch.autograd.grad(out, (q, k, v), dout))))
    got = truth.Truth(case, inputs, 0, 0).right
    torch.testing.assert_close([*got], one_head(right, 0, 0, 1))
    assert tera_operations(case, "forward") * 1e12 == pytest.approx(4 * 2 * 8 * sum(map(sum, seen)), rel=0.1)


def test_masks_appear_when_plans_take_them(monkeypatch):
    assert named_case("1/2:2/8/99/none") == Case(99, 1, 2, 2, 8, False, torch.bfloat16)

    def dense(layout, seq_len, ranks, *, causal): ...

    def any_mask(layout, seq_len, ranks, *, causal, window_size=None, cu_seqlens=None): ...

    monkeypatch.setattr(masks, "make_plan", dense)
    for name in ("packed-lognormal", "window-4096", "window-0"):
        with pytest.raises(ValueError, match=f"cases: mask={name}: expected one of causal, none$"):
            named_case(f"1/2:2/8/8192/{name}")
    monkeypatch.setattr(masks, "make_plan", any_mask)
    packed, window = (named_case(f"1/2:2/8/8192/{name}") for name in ("packed-lognormal", "window-4096"))
    assert (describe(packed), describe(window)) == ("1/2:2/8/8192/packed-lognormal", "1/2:2/8/8192/window-4096")
    assert window.mask == {"causal": True, "window_size": (4095, 0)}
    bounds = packed.mask["cu_seqlens"]
    assert (bounds[0], bounds[-1]) == (0, 8192)
    assert all(0 < end - start <= 8192 for start, end in pairwise(bounds))
    assert local.other_mask(packed) == "is not called with the mask packed-lognormal here"
    long = masks.lognormal_documents(2**22)
    assert len(long) == pytest.approx(2**22 / 4096, rel=0.2)
    assert max(end - start for start, end in pairwise(long)) == 32768


def test_operations_are_counted_as_everybody_counts_them():
    case = named_case("1/32:8/128/8192/none")
    assert describe(case) == "1/32:8/128/8192/none"
    assert tera_operations(case, "forward") == 4 * 32 * 128 * 8192**2 / 1e12
    assert tera_operations(case, "forward+backward") == 3.5 * tera_operations(case, "forward")
    assert tera_operations(case._replace(causal=True), "backward") == 1.25 * tera_operations(case, "forward")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ["32768"]}, "cases=32768: expected batch/q_heads"),
        ({"cases": ["1/3:2/8/8/causal"]}, "expected kv_heads that divide 3"),
        ({"cases": ["1/2:2/8/8/diagonal"]}, "expected one of causal, none"),
        ({"implementations": ["fa5"]}, "implementations=fa5: expected one of ringattn-"),
        ({"passes": ["sideways"]}, "passes=sideways"),
    ],
)
def test_wrong_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kernel.KernelBench(**options)
