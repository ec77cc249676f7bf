"""What the packaging tests share: a copy of the checkout to build from, what was built, and fresh interpreters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root(pytestconfig: pytest.Config) -> Path:
    """The checkout."""
    return pytestconfig.rootpath


@pytest.fixture(scope="session")
def distributions(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this checkout, and the wheel that was built from that sdist.

    Built from a copy: setuptools leaves `build/` behind, and a later wheel would hold what it finds there. And built
    where torch cannot be imported, as in the isolated environment of a `pip install`.
    """
    source, built = tmp_path_factory.mktemp("source") / "ringattn", tmp_path_factory.mktemp("dist")
    leftovers = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "multirun")
    shutil.copytree(root, source, symlinks=True, ignore=leftovers)
    no_torch = tmp_path_factory.mktemp("no_torch")
    (no_torch / "torch.py").write_text("raise ImportError('a build imports nothing of the package, so no torch')\n")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(source)]
    environment = os.environ | {"PYTHONPATH": str(no_torch)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return built


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """Runs code in a fresh interpreter, in a folder, with a search path of its own; returns what it printed."""

    def run(code: str, cwd: Path, search: Path | str = "") -> str:
        environment = os.environ | {"PYTHONPATH": str(search), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
