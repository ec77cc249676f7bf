"""Benches of several ranks: only what is right on every rank gets a figure, and nothing hangs them."""

import contextlib
import importlib.util
import io
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from ringattn.launch.bench import BENCHES, bench
from ringattn.launch.benchmarks import counters, scaling, utilization
from ringattn.launch.benchmarks.across import OursAcross
from ringattn.launch.benchmarks.crew import Crew
from ringattn.launch.benchmarks.tables import table
from ringattn.launch.benchmarks.workers import Failed
from ringattn.launch.gang import Place
from ringattn.launch.records import read_records
from tests.gang import run_ranks
from tests.launch.jobs import Soon
from tests.launch.test_bench import FIELDS

RESULT = FIELDS - {"min_ms", "max_ms"}
ADDED = {"executor", "predicted_ms", "predicted_gib", "synchronised_ms", "exposed_ms", "ranks", "kernel", "clock_mhz"}
ADDED |= {"one_gpu_ms", "one_gpu_ms_each", "one_gpu_impl", "one_gpu_clock_mhz"}
SHAPE = {"tokens": [24], "q_heads": 4, "kv_heads": 2, "head_dim": 16, "patience": 60.0}
QUICK = {"rounds": 1, "budget_ms": 1.0}
OURS = "ringattn-aten-ring-zigzag"
RIVALS = [f"ring-flash-attn-{variant}" for variant in ("ring", "zigzag", "stripe")]
REASONS = {
    "wrong": "wrong on rank 1: out errs",
    "unfinished": "wrong on rank 0: out, dq, dk: values that are not finite",
    "dying": "its process died with exit code 7 on rank 1",
    "raising": "ValueError: not this one on rank 1",
    "refusing": "it is Sunday",
}


class Odd(OursAcross):
    """Right on rank 0; what it does on rank 1 is told by its name."""

    def __init__(self, name: str):
        super().__init__("aten", "ring", "zigzag")
        self.name = name

    def refuses(self, x, case, ranks):
        return "it is Sunday" if self.name == "refusing" else None

    def attend(self, q, k, v, case):
        if dist.get_rank() == 1:
            if self.name == "dying":
                os._exit(7)
            if self.name == "raising":
                raise ValueError("not this one")
            if self.name == "wrong":
                out = super().attend(q, k, v, case)
                return out + 0.001 * out.detach()  # so that no gradient tells rank 0
            if self.name == "unfinished":
                v = v * torch.nan
        return super().attend(q, k, v, case)


class Bell:
    """A station that answers at once, but for one rank."""

    def __init__(self, rank, size, device, where, patience):
        self.rank = rank

    def ring(self, silent):
        if self.rank == silent:
            time.sleep(60)
        return f"{self.rank} answers"


def waiting(place):
    """What becomes of a question that one rank does not answer, and of the next one."""
    crew = Crew(Bell, place, 2, patience=60.0)
    try:
        crew.ask("ring", None)
        began, crew.patience = time.monotonic(), 2.0
        crew.ask("ring", 1)
    except Failed as failure:
        seconds, crew.patience = time.monotonic() - began, 60.0
        return str(failure), seconds, crew.ask("ring", None)
    finally:
        crew.end()


class Contest(scaling.ScalingBench):
    """The odd ones, and some that are right."""

    def chosen(self, device):
        return [*map(Odd, REASONS), *super().chosen(device)]


def hurried(settings, place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "Deadline", Soon)
        yield from scaling.run(settings, place)


ALL = {
    "contest": Contest(
        **SHAPE | {"batch": 2}, **QUICK, ahead=3,
        implementations=["ringattn-aten-ring-striped", "ulysses", "allgather", "torch-cp-allgather"],
    ),
    "rivals": scaling.ScalingBench(
        **SHAPE, **QUICK, dtype="bf16", implementations=RIVALS, passes=["forward"], ahead=3
    ),
    "packed": scaling.ScalingBench(
        **SHAPE, **QUICK, ahead=1, mask="packed-lognormal", passes=["forward"],
        implementations=["ringattn-aten-ring-balanced", "allgather", "ulysses"],
    ),
    "soon": scaling.ScalingBench(
        **SHAPE, **QUICK, ahead=1, implementations=["ulysses"]
    ),
    "late": scaling.ScalingBench(**SHAPE, **QUICK, deadline=0.0),
    "utilization": utilization.UtilizationBench(
        **SHAPE, **QUICK, cases=["1/2:1/8/32/causal"], local=["ringattn-aten", "fa4"], implementations=[OURS]
    ),
}  # fmt: skip


MEMORY = SHAPE | {"bench": "memory", "rings": [1, 2], "implementations": [OURS, "allgather"]}


def work(rank, folder):
    """Of each bench, the records that this rank gives, and what it prints; of one, through the command's own job."""
    place = Place(rank, dist.get_world_size(), torch.device("cpu"), "a test")
    found: dict = {"waiting": waiting(place)}
    for name, settings in ALL.items():
        run = hurried if name == "soon" else BENCHES[settings.bench][1]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            records = [each for records in run(settings, place) for each in records]
        found[name] = records, printed.getvalue()
    config = OmegaConf.create(MEMORY | {"record": f"{folder}/memory.jsonl"})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found["memory"] = bench(config, Path(folder), place), printed.getvalue()
    return found


@pytest.fixture(scope="module")
def gang(tmp_path_factory):
    """What each rank found; one gang for all, because starting it is what takes time."""
    folder = str(tmp_path_factory.mktemp("bench"))
    found = run_ranks(2, work, folder, timeout=110)
    found[0]["recorded"] = read_records(Path(folder) / "memory.jsonl")
    return found


@pytest.fixture
def measured(gang):
    return gang[0]


def test_only_what_is_right_on_every_rank_gets_a_figure(gang):
    records, printed = gang[0]["contest"]
    assert "no figure for torch-cp-allgather: torch's context_parallel runs its CUDA kernels only" in printed
    assert [each["impl"] for each in records] == [
        name for name in ("ringattn-aten-ring-striped", "ulysses", "allgather") for _ in range(2)
    ]
    for name, reason in REASONS.items():
        assert f"no figure for {name}: {reason}" in printed
    elsewhere, silence = gang[1]["contest"]
    assert not silence
    assert len(elsewhere) == len(records)


def test_packed_documents_are_measured_too(measured):
    records, printed = measured["packed"]
    assert [(each["impl"], each["mask"]) for each in records] == [
        ("ringattn-aten-ring-balanced", "packed-lognormal"),
        ("allgather", "packed-lognormal"),
    ]
    assert "no figure for ulysses: is not called with the mask packed-lognormal here" in printed


def test_what_was_measured_before_the_deadline_is_kept(measured):
    (record,), printed = measured["soon"]
    (missing,) = {"forward", "forward+backward"} - {record["pass"]}
    assert f"no figure for ulysses, {missing}: the deadline passed" in printed


def test_nothing_is_begun_after_the_deadline(measured):
    assert measured["late"] == ([], "1/4:2/16/48/causal on 2: not measured: the deadline passed\n")


def test_a_hang_costs_no_more_than_patience(gang):
    for rank in gang:
        reason, seconds, answers = rank["waiting"]
        assert reason == "no answer within 2 s on rank 1"
        assert seconds < 20
        assert answers == ["0 answers", "1 answers"]


def test_what_the_records_of_scaling_hold(measured):
    records, _ = measured["contest"]
    for each in records:
        assert set(each) == FIELDS | ADDED
        assert 0 < each["min_ms"] <= each["median_ms"] <= each["max_ms"]
        assert each["efficiency"] == pytest.approx(each["one_gpu_ms"] / each["median_ms"] / 2)
        assert 1 / each["one_gpu_ms"] == pytest.approx(sum(1 / ms for ms in each["one_gpu_ms_each"]) / 2)
        assert each["one_gpu_impl"] == "ringattn-aten"
        assert each["executor"] == ("ring" if each["impl"].startswith("ringattn-") else None)
    first = records[0]
    assert (first["seq_len"], first["ranks"], first["pass"], first["mask"]) == (48, 2, "forward", "causal")
    assert first["tflops_per_gpu"] == pytest.approx(2 * 4 * 4 * 16 * 48**2 / 2 / first["median_ms"] / 1e9 / 2)
    assert "| 2/4:2/16/48/causal fp32 | ulysses " in table(records)
    head, _, *rows = ([cell.strip() for cell in line.split("|")] for line in table(records).splitlines())
    ratios = {row[head.index("implementation")]: row[head.index("fwd /peers")] for row in rows}
    assert max(ratios["ulysses"], ratios["allgather"]) == "1.00"


def test_ring_flash_attention_is_measured_where_it_is_installed(measured):
    records, printed = measured["rivals"]
    if importlib.util.find_spec("ring_flash_attn") is None:
        assert all(f"no figure for {name}: not installed" in printed for name in RIVALS)
    else:
        assert [each["impl"] for each in records] == RIVALS


def test_memory_of_the_ring_does_not_grow_with_it(gang):
    records = gang[0]["recorded"]
    assert gang[0]["memory"][0] == gang[1]["memory"][0] == {"figures": len(records)}
    assert not gang[1]["memory"][1]  # only the first rank prints
    held = {(each["impl"], each["pass"], each["ranks"]): each["peak_memory_gib"] for each in records}
    assert len(held) == 8
    assert held[OURS, "forward", 2] == held[OURS, "forward", 1] > 4 * 24 * 4 * 16 * 4 / 2**30
    assert held["allgather", "forward", 2] > 1.2 * held["allgather", "forward", 1]
    for each in records:
        assert set(each) == RESULT | {"ranks", "kernel", "executor", "predicted_gib"}
        assert each["seq_len"] == 24 * each["ranks"]
    assert "| 24              | ringattn-aten-ring-zigzag | forward " in gang[0]["memory"][1]


def test_one_gpu_is_timed_and_what_has_no_counters_says_so(measured):
    records, printed = measured["utilization"]
    alone = [each for each in records if "timeline" not in each]
    assert [(each["impl"], each["pass"]) for each in alone] == [
        ("ringattn-aten", "forward"),
        ("ringattn-aten", "backward"),
    ]
    for each in alone:
        assert set(each) == FIELDS | set(counters.FIELDS) | {"peak_tflops", "peak_gbs", "peak_share"}
        assert each["peak_share"] == each["tflops_per_gpu"] / each["peak_tflops"] > 0
    assert "no figure for fa4: " in printed
    assert "no counters for ringattn-aten, forward: a CPU has none" in printed
    assert "ringattn-aten" in table(records)


def test_a_timeline_of_compute_and_communication_on_every_rank(measured):
    records, _ = measured["utilization"]
    (record,) = (each for each in records if "timeline" in each)
    assert set(record) == RESULT | {"ranks", "kernel", "timeline"}
    seen = {(rank, what) for rank, what, *_ in record["timeline"]}
    assert seen == {(rank, what) for rank in (0, 1) for what in ("compute", "communication")}
    assert min(start for _, _, start, _ in record["timeline"]) == 0
    assert all(start <= end for _, _, start, end in record["timeline"])
