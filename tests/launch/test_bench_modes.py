"""Precision and hardware counters, and requests that make no sense."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from ringattn.launch.bench import BENCHES, register, resolve
from ringattn.launch.benchmarks import counters, memory, precision, utilization
from ringattn.launch.benchmarks.tables import table
from ringattn.launch.gang import Place
from tests.launch.test_bench import FIELDS

CPU = torch.device("cpu")
RESULT = FIELDS - {"min_ms", "max_ms"}
OURS = "ringattn-aten-ring-zigzag"


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


CASE = ("1/2:1/8/32/causal", "bf16", 0, 20.0)
MARK = ["0", "at::cuda::(anonymous namespace)::spin_kernel(long)", *("7" for _ in counters.METRICS)]


def test_counters_of_several_kernels_are_weighted_by_their_time(tmp_path, monkeypatch):
    units = ["", "", "ns", "byte", "byte", *("%" for _ in counters.SHARES)]
    first = ["1", "a", "3,000,000", str(2**29), str(2**29), "80", "10", "50", "32", "60"]
    second = ["2", "b", "1,000,000", "0", str(2**30), "40", "50", "90", "16", "n/a"]
    other = ["4", "c", "1,000,000", "0", "0", "25", "0", "0", "0", "0"]
    pretend(tmp_path, monkeypatch, HEAD, units, MARK, first, second, MARK, other, MARK)
    counted = counters.count(["ringattn-triton", "torch-fa2"], *CASE)
    assert list(counted) == [("ringattn-triton", "forward"), ("ringattn-triton", "backward")]
    assert counted["ringattn-triton", "backward"]["sm_utilization"] == 0.25
    found = counted["ringattn-triton", "forward"]
    assert set(found) == set(counters.FIELDS)
    assert (found["kernels"], found["profiled_ms"], found["dram_gib"]) == (2, 4.0, 2.0)
    assert found["sm_utilization"] == pytest.approx(0.7)
    assert found["memory_utilization"] == pytest.approx(0.2)
    assert found["warp_efficiency"] == pytest.approx(0.875)
    assert found["tensor_utilization"] == pytest.approx(0.6)  # of the kernels that tell it


def test_a_profiler_that_sees_nothing_is_named(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch)
    with pytest.raises(counters.Missing, match="saw no kernel: ==PROF== Connected to process 1"):
        counters.count(["ringattn-triton"], *CASE)


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


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_composes(name):
    register()
    with initialize_config_module("ringattn.conf", version_base="1.3"):
        assert isinstance(resolve(compose("bench", [f"bench={name}"])), BENCHES[name][0])


def test_the_command_prints_a_table_and_appends_records(tmp_path: Path):
    options = ["cases=[1/2:1/8/32/causal]", "rings=[1,2]", f"record={tmp_path}/p.jsonl", f"hydra.run.dir={tmp_path}"]
    command = [sys.executable, "-m", "ringattn.launch.bench", "bench=precision", "parallel.device=cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "| 1/2:1/8/32/causal bf16 | ringattn-aten-ring-zigzag | 2 " in done.stdout
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [each["ranks"] for each in records] == [1] * 8 + [2] * 8


def test_rings_must_not_be_larger_than_the_gang():
    assert memory.MemoryBench().sizes(6) == [1, 2, 4, 6]
    with pytest.raises(ValueError, match="at most 2 ranks"):
        memory.MemoryBench(rings=[4]).sizes(2)
