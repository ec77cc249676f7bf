"""The host's part of a launch, under every release of Triton (see test_machine_code.py), without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.aot.test_machine_code import RELEASES, ROOT

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.timeout(300),
]


def run(release: str, script: str, *arguments: str) -> str:
    path = os.pathsep.join(map(str, filter(None, (RELEASES[release], ROOT))))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "aot" / script, *arguments],
        env=environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("release", RELEASES)
def test_what_is_started_again_is_what_triton_would_choose(release):
    launches, again = map(int, re.findall(r"\d+", run(release, "variants.py", "400")))
    assert again > launches // 10


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("release", RELEASES)
def test_compiled_kernels_start_again_through_tritons_launcher(release):
    assert len(run(release, "host_time.py").splitlines()) == 6
