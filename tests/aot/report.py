"""Compiles kernels for a GPU that is not there, and reports what the machine code is made of, as JSON lines.

    python tests/aot/report.py sm_90 64 128          # architecture, head dims

The whole launch path runs, on tensors without storage and under a driver that only names its target; each kernel is
compiled instead of launched. Which release of Triton compiles is a matter of PYTHONPATH. On sm_90 the
Hopper kernels are compiled too.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ringattn.kernels import hopper_backward_launch, hopper_forward_launch, triton_launch, triton_settling
from ringattn.kernels.interface import Arrival, Part
from ringattn.kernels.segments import NO_WINDOW, Segment, Segments
from ringattn.kernels.tuning import LONG
from ringattn.transport.await_kernel import await_kernel
from tests.aot import sass

TOOLS = Path(triton.backends.__path__[0]) / "nvidia" / "bin"
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", re.MULTILINE)
# Every warp of a warpgroup has stored a part of a tile by TMA and waited for it; then one lane says that it is there.
TOO_EARLY = re.compile(r"cp\.async\.bulk\.wait_group 0;(?:(?!bar\.sync|atom\.|red\.|bra).)*mbarrier\.arrive", re.DOTALL)


class NamedTarget:
    """Just enough of a driver to compile for an architecture."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compiled_by(capability: int, calls: Iterable[Callable[[], None]]) -> list:
    """The kernels that the calls would launch on such a GPU, each once."""
    driver.set_active(NamedTarget(capability))  # pyright: ignore[reportArgumentType]
    kernels, run = [], JITFunction.run

    def compile_only(self, *args, warmup, **options):
        kernels.append(run(self, *args, warmup=True, **options))

    JITFunction.run = compile_only
    try:
        for call in calls:
            call()
    finally:
        JITFunction.run = run
    return list(dict.fromkeys(kernels))


def attend(architecture: str, head_dim: int, dtype: torch.dtype, length: int, window: int) -> None:
    """Causal attention as the ring does it: merged into a running result, gradients added to running sums."""
    q, dout = torch.empty(2, 1, length, 32, head_dim, dtype=dtype, device="meta")
    k, v = torch.empty(2, 1, length, 8, head_dim, dtype=dtype, device="meta")
    dq, dk, dv, out = (torch.empty_like(x, dtype=torch.float32) for x in (q, k, v, q))
    lse, delta = torch.empty(2, 1, 32, length, device="meta")
    segments = Segments([Segment(0, length, 0, length, 0, window)])
    triton_launch.forward(q, k, v, segments, 0.1, (out, lse), torch.float32)
    triton_launch.row_delta(dout, out.to(dtype))
    triton_launch.key_gradients(dout, q, k, v, lse, delta, segments, 0.1, dk, dv)
    triton_launch.query_gradients(dout, q, k, v, lse, delta, segments, 0.1, dq)
    own = Part(slice(0, length), dk, dv)
    triton_settling.settled(dq, [own], [own], dtype)
    if architecture == "sm_90":
        hopper_forward_launch.forward(q, k, v, segments, 0.1, None, dtype)
        hopper_forward_launch.forward(q, k, v, segments, 0.1, (out, lse), torch.float32)
        flags, error = torch.empty(2, 1, 4, dtype=torch.int32, device="meta")
        arrival = Arrival(k, v, flags, error, length, 1 << 40, error)
        hopper_forward_launch.forward(q, k, v, segments, 0.1, None, dtype, arrival)
        for deterministic in (False, True):
            inputs = (dout, q, k, v, lse, delta, segments, 0.1)
            hopper_backward_launch.backward(*inputs, None, None, None, deterministic)
            hopper_backward_launch.backward(*inputs, dq, dk, dv, deterministic)
            hopper_backward_launch.backward(*inputs, None, None, None, deterministic, dtype)
            on_their_way = {"arrival": arrival, "homes": [torch.stack((dk, dv))]}
            hopper_backward_launch.backward(*inputs, None, None, None, deterministic, **on_their_way)


def wait(ranks: int) -> None:
    """For the words of so many ranks."""
    words, late, count = torch.empty(3, ranks, dtype=torch.int32, device="meta")
    error, poison = torch.empty(2, dtype=torch.int64, device="meta"), torch.empty(9, dtype=torch.uint8, device="meta")
    launch: Any = await_kernel[(1,)]
    launch(words, error, late, poison, count, 9, 1 << 40, 1, ranks, num_warps=1)


def report(kernel) -> dict:
    """What one compiled kernel is made of."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        dump = subprocess.run(
            [TOOLS / "nvdisasm", "--print-code", cubin.name], check=True, capture_output=True, text=True
        )
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name], check=True, capture_output=True, text=True
        )
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert registers is not None
    return {
        "kernel": kernel.metadata.name,
        "registers": int(registers[1]),
        "stack": int(registers[2]),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "looks": re.findall(r"(?:ld|atom)\.global\S*acquire\S*", kernel.asm["ptx"]),
        "too_early": len(TOO_EARLY.findall(kernel.asm["ptx"])),
        "overwritten": sass.overwritten_operands(dump.stdout),
        "maxima_first": sass.maxima_before_the_branch(dump.stdout),
        "opcodes": dict(collections.Counter(OPCODE.findall(dump.stdout)).most_common()),
    }


def main(architecture: str, *head_dims: str) -> None:
    triton_launch.architecture = hopper_forward_launch.architecture = lambda device: architecture
    for head_dim in map(int, head_dims):
        calls = [
            partial(attend, architecture, head_dim, torch.bfloat16, *call)
            for call in product((LONG, LONG // 4), (NO_WINDOW, 9))
        ]
        calls += [partial(wait, ranks) for ranks in (2, 8)]
        for kernel in compiled_by(int(architecture.removeprefix("sm_")), calls):
            line = {"triton": triton.__version__, "architecture": architecture, "head_dim": head_dim}
            print(json.dumps(line | report(kernel)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
