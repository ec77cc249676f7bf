"""Both ways in, as users type them: sweeps with a failing job or stopped in the middle, and torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringattn.launch import metrics
from ringattn.launch.report import report_sweep
from ringattn.launch.results import read_rows

pytestmark = pytest.mark.timeout(120)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ringattn.launch.train"]
PARENT = [sys.executable, "-m", "ringattn.launch.train"]


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """A command in a folder from which the package is found as it is by these tests."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """All that it said; the process is gone afterwards."""
    try:
        return process.communicate(timeout=90)[0]
    finally:
        process.kill()


def runs(folder: Path) -> list[Path]:
    """Folders of runs below, oldest first."""
    return sorted(path.parent for path in folder.rglob(metrics.METRICS))


def test_a_sweep_goes_on_after_a_failing_job(tmp_path: Path, overrides: list[str]):
    sweep = ["-m", *overrides, "steps=3", "parallel.ranks=1", "parallel.layout=zigzag,bogus,striped"]
    process = start([*PARENT, *sweep, "hydra.sweep.dir=sweep"], tmp_path)
    output = finish(process)
    rows = read_rows(tmp_path / "sweep" / "results.csv")
    assert [(row["job"], row["parallel.layout"], row["status"]) for row in rows] == [
        ("0", "zigzag", "ok"),
        ("1", "bogus", "failed"),
        ("2", "striped", "ok"),
    ], output
    assert process.returncode != 0
    assert "ValueError: got layout='bogus'" in output
    assert "in make_layout" in output, "the rank's own traceback"
    assert "bogus" in rows[1]["error"]
    assert rows[1]["loss"] == ""
    assert float(rows[0]["loss"]) == pytest.approx(float(rows[2]["loss"]), abs=1e-5)
    table = report_sweep(tmp_path / "sweep")
    assert "| striped " in table
    assert "steps=3" in table.splitlines()[-1], "what all jobs have in common is said once"
    assert (tmp_path / "sweep" / "losses.png").is_file()


def test_a_stopped_sweep_keeps_its_rows(tmp_path: Path, overrides: list[str]):
    sweep = ["-m", *overrides, "parallel.ranks=1", "log_every=1,2", "steps=100000", "hydra.sweep.dir=sweep"]
    process = start([*PARENT, *sweep], tmp_path)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.rglob(metrics.METRICS)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output = finish(process)
    rows = read_rows(tmp_path / "sweep" / "results.csv")
    assert [row["status"] for row in rows] == ["interrupted"], output
    assert process.returncode != 0


def test_two_torchruns_at_once_make_a_folder_each(tmp_path: Path, overrides: list[str]):
    both = [start([*TORCHRUN, *overrides, f"seed={seed}", "steps=2"], tmp_path) for seed in (0, 1)]
    outputs = [finish(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    folders = runs(tmp_path / "outputs")
    assert len(folders) == 2
    assert len(list((tmp_path / "outputs").glob("*/*"))) == 2, "ranks but the first make none"
    losses = {metrics.read(folder)[1]["loss"] for folder in folders}
    assert len(losses) == 2, "each ran with its own seed"


def test_a_sweep_inside_torchrun_is_refused_with_the_right_command(tmp_path: Path, overrides: list[str]):
    process = start([*TORCHRUN, "-m", "seed=1,2", "steps=2"], tmp_path)
    output = finish(process)
    assert process.returncode != 0
    assert "python -m ringattn.launch.train -m seed=1,2 steps=2 parallel.ranks=2" in output
    assert not list(tmp_path.iterdir())
