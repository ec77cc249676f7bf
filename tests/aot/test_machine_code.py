"""The shipped tilings compile to what they should for GPUs that are not there: matrix instructions, no spilled
registers, no more shared memory than there is.

RINGATTN_TRITONS names a folder that holds further releases of Triton, as `make test` has it in .venv/tritons:

    pip install --no-deps --target tritons/3.9.0 triton==3.9.0
    RINGATTN_TRITONS=tritons pytest tests/aot
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.aot import sass

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).parents[2]
FURTHER = Path(os.environ.get("RINGATTN_TRITONS", os.devnull)).resolve()
RELEASES = {"installed": None} | {folder.name: folder for folder in sorted(FURTHER.glob("*"))}
REGISTERS = 1 << 16  # of a multiprocessor
BARE = ("await_kernel", "delta_kernel", "settling_kernel", "prepare_kernel")  # nothing is multiplied
KERNELS = (*BARE[:3], "forward_kernel", "key_gradients_kernel", "query_gradients_kernel")
HOPPER = ("hopper_forward_kernel", "prepare_kernel", "hopper_backward_kernel")


class Target(NamedTuple):
    """What the code for an architecture must hold, and the shared memory that a block may take."""

    head_dims: tuple[int, ...]
    matrix: str
    copy: str
    shared: int


TARGETS = {
    "sm_80": Target((64, 128), "HMMA", "LDGSTS", 163 << 10),
    "sm_90": Target((64, 128), "HGMMA", "UTMALDG", 227 << 10),
    "sm_100": Target((64, 128), "UTCHMMA", "UTMALDG", 227 << 10),
}


def compile_for(release: str, architecture: str) -> list[dict]:
    path = os.pathsep.join(map(str, filter(None, (ROOT, RELEASES[release]))))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    head_dims = map(str, TARGETS[architecture].head_dims)
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "aot" / "report.py", architecture, *head_dims],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, str], list[dict]]:
    """Everything compiled, as many at once as there are processors."""
    builds = [(release, architecture) for release in RELEASES for architecture in TARGETS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(builds, pool.map(lambda build: compile_for(*build), builds), strict=True))


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("release", RELEASES)
def test_shipped_tilings(reports, release: str, architecture: str):
    target = TARGETS[architecture]
    lines = reports[release, architecture]
    compiled = {(line["kernel"], line["head_dim"]) for line in lines}
    kernels = KERNELS + HOPPER if architecture == "sm_90" else KERNELS
    assert compiled == set(product(kernels, target.head_dims))
    for line in lines:
        name = f"{line['kernel']} at head dim {line['head_dim']}, triton {line['triton']}"
        assert release in ("installed", line["triton"])
        opcodes = line["opcodes"]
        if line["kernel"] in HOPPER:
            assert line["overwritten"] == [], f"{name}: registers overwritten that matrix instructions read"
        assert line["too_early"] == 0, f"{name}: tiles count as stored before all warps have stored their parts"
        if line["kernel"] == "hopper_forward_kernel":
            assert line["maxima_first"] == 0, f"{name}: exponentials wait for maxima"
        assert line["stack"] == 0, f"{name}: {line['stack']} bytes of registers spilled"
        assert not {"LDL", "STL"} & opcodes.keys(), f"{name}: spills"
        if line["kernel"] == "await_kernel":
            assert line["looks"], f"{name}: it never looks"
            assert all(".sys" in look for look in line["looks"]), f"{name}: what other GPUs write may not be seen"
        if line["kernel"] in BARE:
            continue
        assert opcodes.get(target.matrix, 0) > 0, f"{name}: no {target.matrix}"
        assert opcodes.get(target.copy, 0) > 0, f"{name}: no {target.copy}"
        assert line["shared"] <= target.shared, f"{name}: {line['shared']} bytes of shared memory"
        alone = line["registers"] * line["warps"] * 32 > REGISTERS / 2 or line["shared"] > target.shared / 2
        # Where nobody else multiplies meanwhile. More waits than instructions: the assembler gave up overlapping them.
        if architecture == "sm_90" and alone:
            assert opcodes["HGMMA"] > opcodes["WARPGROUP"], f"{name}: matrix instructions are serialised"


def test_the_readings_of_machine_code():
    """Two products: scores, and one whose left operand, R24 to R27, is written by the last exponential. A maximum
    before the first branch, and one behind it."""
    loop = """
.L_x_1:
        /*0010*/  HGMMA.64x128x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0020*/  HGMMA.64x128x16.F32.BF16 R152, R24, gdesc[UR8].tnspB, R152, gsb0 ;
        /*0030*/  WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/  MUFU.EX2 R88, R88 ;
        /*0050*/  MUFU.EX2 R27, R89 ;
        /*0070*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/  FMNMX R90, R88, R89, !PT ;
        /*0090*/  F2FP.BF16.F32.PACK_AB R24, R88, R89 ;
        /*00a0*/  @!P1 BRA `(.L_x_2) ;
        /*00b0*/  FMNMX R91, R88, R89, !PT ;
.L_x_2:
        /*00c0*/  @P0 BRA `(.L_x_1) ;
"""
    assert sass.overwritten_operands(loop) == ["MUFU.EX2 R27, R89 "]
    assert sass.maxima_before_the_branch(loop) == 1
