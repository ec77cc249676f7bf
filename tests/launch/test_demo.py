"""The demo, end to end and much shortened, and when it fails."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from ringattn.launch.demo import holds

pytestmark = pytest.mark.timeout(120)


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "ringattn.launch.demo", *overrides, "steps=14", "optimizer.lr=1e-2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| step | 2 ranks  | 1 rank   | difference |" in done.stdout
    assert "largest difference: " in done.stdout
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["losses.png", "plan.png"]


@pytest.mark.parametrize(
    ("fall", "widest", "allowed", "passes"),
    [
        (1.5, 9e-5, 1e-4, True),
        (1.5, 0.02, None, True),  # bf16: no bound
        (0.9, 0.0, 1e-4, False),
        (1.5, 1e-4, 1e-4, False),
        (1.5, math.nan, 1e-4, False),
        (math.nan, 0.0, None, False),
    ],
)
def test_what_the_demo_demands(fall: float, widest: float, allowed: float | None, passes: bool):
    assert holds(fall, widest, allowed) == passes
