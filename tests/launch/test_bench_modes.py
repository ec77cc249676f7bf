"""Memory, precision and utilization, measured at toy size."""

import contextlib
import io
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ringattn.launch.bench import BENCHES
from ringattn.launch.benchmarks import counters, memory, precision, utilization
from ringattn.launch.benchmarks.tables import table
from ringattn.launch.gang import Place
from tests.gang import run_ranks
from tests.launch.test_bench import FIELDS

CPU = torch.device("cpu")
RESULT = FIELDS - {"min_ms", "max_ms"}
SHAPE = {"tokens": [24], "q_heads": 4, "kv_heads": 2, "head_dim": 16, "patience": 60.0}
OURS = "ringattn-aten-ring-zigzag"


def benches(rank, *all_settings):
    """Of several benches, the records that one rank gives, and what it prints."""
    place = Place(rank, dist.get_world_size(), CPU, "a test")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found = [
            [each for records in BENCHES[settings.bench][1](settings, place) for each in records]
            for settings in all_settings
        ]
    return found, printed.getvalue()


@pytest.fixture(scope="module")
def measured():
    """Records of memory and of utilization, from one gang, and what was printed."""
    weighing = memory.MemoryBench(**SHAPE, rings=[1, 2], implementations=[OURS, "allgather"])
    looking = utilization.UtilizationBench(
        **SHAPE, cases=["1/2:1/8/32/causal"], local=["ringattn-aten", "fa4"], implementations=[OURS], budget_ms=1
    )
    (found, printed), _ = run_ranks(2, benches, weighing, looking, timeout=100)
    return *found, printed


def test_memory_of_the_ring_does_not_grow_with_it(measured):
    records, *_ = measured
    held = {(each["impl"], each["pass"], each["ranks"]): each["peak_memory_gib"] for each in records}
    assert len(held) == 8
    assert held[OURS, "forward", 2] == held[OURS, "forward", 1] > 4 * 24 * 4 * 16 * 4 / 2**30
    assert held["allgather", "forward", 2] > 1.2 * held["allgather", "forward", 1]
    for each in records:
        assert set(each) == RESULT | {"ranks", "kernel"}
        assert each["seq_len"] == 24 * each["ranks"]
    assert "| 24              | ringattn-aten-ring-zigzag | forward " in table(records)


def test_one_gpu_is_timed_and_what_has_no_counters_says_so(measured):
    _, records, printed = measured
    alone = [each for each in records if "timeline" not in each]
    assert [(each["impl"], each["pass"]) for each in alone] == [
        ("ringattn-aten", "forward"),
        ("ringattn-aten", "backward"),
    ]
    for each in alone:
        assert set(each) == FIELDS | set(counters.FIELDS) | {"peak_tflops", "peak_gbs", "peak_share"}
        assert each["peak_share"] == each["tflops_per_gpu"] / each["peak_tflops"] > 0
    assert "no figure for fa4: not installed" in printed
    assert "no counters for ringattn-aten, forward: Nsight Compute (ncu) is not on the PATH" in printed
    assert "ringattn-aten" in table(records)


def test_a_timeline_of_compute_and_communication_on_every_rank(measured):
    _, records, _ = measured
    (record,) = (each for each in records if "timeline" in each)
    assert set(record) == RESULT | {"ranks", "kernel", "timeline"}
    seen = {(rank, what) for rank, what, *_ in record["timeline"]}
    assert seen == {(rank, what) for rank in (0, 1) for what in ("compute", "communication")}
    assert min(start for _, _, start, _ in record["timeline"]) == 0
    assert all(start <= end for _, _, start, end in record["timeline"])


def test_error_as_the_ring_grows():
    settings = precision.PrecisionBench(cases=["1/4:2/16/128/causal"], rings=[1, 2, 5])
    (records,) = precision.run(settings, Place(0, 1, CPU, "a test"))
    assert set(records[0]) == RESULT | {"part", "error", "ranks"}
    errors = {(each["impl"], each["ranks"], each["part"]): each["error"] for each in records}
    assert len(errors) == 2 * 3 * 4
    for part in ("out", "dq", "dk", "dv"):
        assert errors["rounded-partials-aten", 1, part] == pytest.approx(errors[OURS, 1, part], rel=0.05)
        for ranks in (2, 5):
            assert 0 < errors[OURS, ranks, part] < errors["rounded-partials-aten", ranks, part] < 0.01
    assert "| 5     |" in table(records)


def test_rounding_partials_of_fp64_changes_nothing():
    """The experiment is the same ring, but for the rounding."""
    settings = precision.PrecisionBench(cases=["1/2:1/8/40/none"], rings=[3], dtype="fp64", layout="striped")
    (records,) = precision.run(settings, Place(0, 1, CPU, "a test"))
    assert all(each["error"] < 1e-14 for each in records)


PROFILER = """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
cat > "$2" <<'END'
==PROF== Connected to process 1
{rows}
END
"""
HEAD = ["ID", "Kernel Name", *counters.METRICS]


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, *rows: list[str]) -> None:
    """An ncu that tells these rows."""
    lines = [",".join(f'"{cell}"' for cell in row) for row in rows]
    program = folder / "ncu"
    program.write_text(PROFILER.replace("{rows}", "\n".join(lines)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_counters_of_several_kernels_are_weighted_by_their_time(tmp_path, monkeypatch):
    units = ["", "", "ns", "byte", "byte", *("%" for _ in counters.SHARES)]
    first = ["0", "a", "3,000,000", str(2**29), str(2**29), "80", "10", "50", "32", "60"]
    second = ["1", "b", "1,000,000", "0", str(2**30), "40", "50", "90", "16", "n/a"]
    pretend(tmp_path, monkeypatch, HEAD, units, first, second)
    found = counters.count("ringattn-triton", "1/2:1/8/32/causal", "bf16", "forward", seed=0, patience=20)
    assert set(found) == set(counters.FIELDS)
    assert (found["kernels"], found["profiled_ms"], found["dram_gib"]) == (2, 4.0, 2.0)
    assert found["sm_utilization"] == pytest.approx(0.7)
    assert found["memory_utilization"] == pytest.approx(0.2)
    assert found["warp_efficiency"] == pytest.approx(0.875)
    assert found["tensor_utilization"] == pytest.approx(0.6)  # of the kernels that tell it


def test_a_profiler_that_sees_nothing_is_named(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch)
    with pytest.raises(counters.Missing, match="saw no kernel: ==PROF== Connected to process 1"):
        counters.count("ringattn-triton", "1/2:1/8/32/causal", "bf16", "forward", seed=0, patience=20)


@pytest.mark.parametrize(
    ("schema", "options", "message"),
    [
        (memory.MemoryBench, {"rings": [0]}, "rings=\\[0\\]"),
        (precision.PrecisionBench, {"layout": "diagonal"}, "layout=diagonal: expected one of contiguous"),
        (utilization.UtilizationBench, {"local": ["fa5"]}, "local=fa5: expected one of ringattn-"),
    ],
)
def test_wrong_requests_are_refused(schema, options, message):
    with pytest.raises(ValueError, match=message):
        schema(**options)


def test_rings_must_not_be_larger_than_the_gang():
    assert memory.MemoryBench().sizes(6) == [1, 2, 4, 6]
    with pytest.raises(ValueError, match="at most 2 ranks"):
        memory.MemoryBench(rings=[4]).sizes(2)
