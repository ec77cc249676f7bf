"""The Hopper kernels under compute-sanitizer, which comes with the CUDA toolkit: memory out of bounds, barriers used
wrongly, and accesses to shared memory that race. Cases are small, since it makes kernels a hundred times slower.

    compute-sanitizer --tool racecheck --kernel-name kns=hopper python tests/gpu/test_sanitizer.py

One report of racecheck's is none of ours and not a race. Triton keeps a table of which warps do what: the first four
write it, all meet at barrier 1, the others read it; and once more at the end. That code has no line of its own, so it
is reported at the line where the kernel's function begins.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ringattn.kernels.hopper import HopperKernel
from ringattn.kernels.interface import Arrival
from ringattn.kernels.segments import Segment, Segments

SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH')}{os.pathsep}/usr/local/cuda/bin")

pytestmark = [
    pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
    pytest.mark.timeout(300),
]
DONE = "all kernels have run"
FAULTY = 3  # exit status
SLOT = 128  # keys that are there before those of two others come


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_clean(tool: str):
    command = [SANITIZER, "--tool", tool, "--kernel-name", "kns=hopper", "--error-exitcode", FAULTY]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every tensor has bounds of its own
    done = subprocess.run(
        [*map(str, command), sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert DONE in done.stdout, done.stdout[-5000:] + done.stderr[-5000:]
    if tool == "racecheck":
        assert ours(done.stdout) == []
        assert done.returncode in (0, FAULTY)
    else:
        assert done.returncode == 0, done.stdout[-5000:]


def ours(output: str) -> list[str]:
    """The races in racecheck's output but those on Triton's table."""
    from ringattn.kernels.hopper_backward import hopper_backward_kernel
    from ringattn.kernels.hopper_forward import hopper_forward_kernel

    begins = []
    for kernel in (hopper_forward_kernel, hopper_backward_kernel):
        lines, number = inspect.getsourcelines(kernel.fn)
        number += next(i for i, line in enumerate(lines) if line.startswith("def "))
        begins.append(f"{Path(inspect.getfile(kernel.fn)).name}:{number}")
    races = re.findall(r"Race reported between .*(?:\n=+     and .*)*", output)
    return [race for race in races if not re.search(rf"between Read access at .* in ({'|'.join(begins)})\n", race)]


def main() -> None:
    """Tiles that are not full, a window, a merge, grouped heads, more tiles than one; keys on their way, some of which
    do not come."""
    from ringattn.kernels.hopper_backward_launch import backward

    rows, keys = 333, 290
    segments = Segments([Segment(0, 200, 0, keys, 20), Segment(200, 133, 50, 240, 100, 60)])
    kernel: Any = HopperKernel()
    for d in (64, 128):
        q, dout = torch.randn(2, 1, rows, 4, d, device="cuda", dtype=torch.bfloat16)
        k, v = torch.randn(2, 1, keys, 2, d, device="cuda", dtype=torch.bfloat16)
        out, lse = kernel.forward(q, k, v, segments, scale=0.1)
        kernel.forward(q, k, v, segments, scale=0.1, running=(out.clone(), lse.clone()), margin=130)
        delta = kernel.row_delta(dout, out)
        for deterministic in (False, True):
            backward(dout, q, k, v, lse, delta, segments, 0.1, None, None, None, deterministic)
        near_k, far_k, near_v, far_v = (x.contiguous() for whole in (k, v) for x in whole.split([SLOT, keys - SLOT], 1))
        for late in (False, True):
            flags = torch.zeros(2, 2, dtype=torch.int32, device="cuda")
            homes = [torch.empty(2, 1, n, 2, d, device="cuda") for n in (SLOT, keys - 2 * SLOT)]
            epoch, error = torch.full((1,), late, dtype=torch.int32, device="cuda"), torch.zeros_like(flags[0, :1])
            begun = kernel.begin(dout, q, v, out, lse, None, scale=0.1)
            arrival = Arrival(far_k, far_v, flags, epoch, SLOT, 1, error)
            inputs = dout, q, near_k, near_v, out, lse, None, segments
            kernel.backward(*inputs, scale=0.1, **begun, arrival=arrival, homes=homes)
        torch.cuda.synchronize()
    print(DONE)


if __name__ == "__main__":
    main()
