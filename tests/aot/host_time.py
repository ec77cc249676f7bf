"""What the host spends on a call, without a GPU: Triton's own binding, descriptors and launcher, and a CUDA driver that
does nothing, compiled on the spot. Tensors are tiny and on the CPU.

    python tests/aot/host_time.py                        # microseconds of each call
    python tests/aot/host_time.py "attention backward"   # one of them, by function

What a CUDA driver and the wake-up of autograd's threads take comes on top: about as much again.
"""

from __future__ import annotations

import cProfile
import ctypes
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

import ringattn
from ringattn.kernels import hopper_forward_launch, triton_launch
from ringattn.kernels.hopper import HopperKernel
from ringattn.kernels.interface import Part
from ringattn.kernels.segments import Segment, Segments
from tests.aot.report import NamedTarget

ROWS = 8
NOTHING = """
#include <stdint.h>
int cuDeviceGetAttribute(int *v, int a, int d) { *v = 232448; return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { *v = 1024; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuModuleLoadData(void **m, const void *d) { *m = (void *)1; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *n) { *f = (void *)1; return 0; }
int cuPointerGetAttribute(uint64_t *out, int a, uint64_t p) { *out = p; return 0; }
"""
ALSO = (
    "cuGetErrorString cuDevicePrimaryCtxRetain cuCtxSetLimit cuCtxGetLimit cuCtxSetCurrent cuCtxGetDevice cuDeviceGet "
    "cuTensorMapEncodeTiled cuOccupancyMaxActiveClusters cuFuncSetAttribute cuFuncSetCacheConfig cuLaunchKernelEx "
    "cuModuleUnload cuStreamIsCapturing"
)


class Idle(NamedTarget):
    """A driver for a Hopper GPU that is not there, which launches."""

    def __init__(self) -> None:
        super().__init__(90)
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher


def idle_driver(folder: Path) -> None:
    """Makes it the one that Triton uses."""
    source, library = folder / "cuda.c", folder / "libcuda.so.1"
    source.write_text(NOTHING + "".join(f"int {name}() {{ return 0; }}\n" for name in ALSO.split()))
    subprocess.run(["cc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    nvidia.libcuda_dirs = lambda: [str(folder)]
    driver.set_active(Idle())  # pyright: ignore[reportArgumentType]
    triton_launch.architecture = hopper_forward_launch.architecture = lambda device: "sm_90"
    HopperKernel.refuses = lambda self, q, k, v: None


def calls() -> dict[str, Callable[[], Any]]:
    """What is measured: 32 query heads, 8 key/value heads of 128, causal."""
    q, dout = torch.zeros(2, 1, ROWS, 32, 128, dtype=torch.bfloat16)
    k, v = torch.zeros(2, 1, ROWS, 8, 128, dtype=torch.bfloat16)
    segments, kernel = Segments([Segment(0, ROWS, 0, ROWS, 0)]), HopperKernel()
    out, lse = kernel.forward(q, k, v, segments, scale=0.1, out_dtype=q.dtype)
    delta = kernel.row_delta(dout, out)
    dq, *sums = kernel.backward(dout, q, k, v, out, lse, delta, segments, scale=0.1)
    own = [Part(slice(0, ROWS), *sums)]
    attend = ringattn.ContextParallel(kernel="hopper").attention
    leaves = [x.requires_grad_() for x in (q.clone(), k.clone(), v.clone())]
    result = attend(*leaves, causal=True)
    return {
        "kernel forward": lambda: kernel.forward(q, k, v, segments, scale=0.1, out_dtype=q.dtype),
        "kernel delta": lambda: kernel.row_delta(dout, out),
        "kernel backward": lambda: kernel.backward(dout, q, k, v, out, lse, delta, segments, scale=0.1),
        "kernel settling": lambda: kernel.settled(dq, own, own, q.dtype),
        "attention forward": lambda: attend(*leaves, causal=True),
        "attention backward": lambda: torch.autograd.grad(result, leaves, dout, retain_graph=True),
    }


def microseconds(call: Callable[[], Any], times: int = 100) -> float:
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times * 1e6


def main(name: str = "") -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        idle_driver(Path(folder))
        for each, call in calls().items():
            if name in ("", each):
                microseconds(call)
                print(f"{each:20} {min(microseconds(call) for _ in range(20)):6.1f} us", flush=True)
            if name == each:
                with cProfile.Profile() as profile:
                    microseconds(call, 1000)
                pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main(*sys.argv[1:])
