"""One forward and one backward of each of some local implementations, for Nsight Compute to look at.

    python -m ringattn.launch.benchmarks.once SECONDS 1/32:8/128/8192/causal bf16 SEED ringattn-triton torch-cudnn ...

Everything before a call, compiling included, is outside the profiled ranges. In front of each call stands a kernel
called `MARKER`, so that a list of all kernels tells which call launched which. After SECONDS no call is begun, because
Nsight Compute tells nothing of a program that it had to end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from ..oracle import make_inputs
from .cases import DTYPES, named_case
from .implementations import local_implementations
from .timing import Deadline

__all__ = ["MARKER", "main"]

MARKER = "spin_kernel"  # what torch.cuda._sleep launches


def main(seconds: str, case_text: str, dtype: str, seed: str, *names: str) -> None:
    deadline = Deadline(float(seconds))
    case, known = named_case(case_text, DTYPES[dtype]), local_implementations()
    inputs = make_inputs(case, int(seed), "cuda")
    for each in (known[name] for name in names):
        if deadline.passed():
            break
        x = each.prepare(inputs, case)
        saved = each.forward(x, case)
        each.backward(x, saved, case)
        marked(lambda each=each, x=x: each.forward(x, case))
        marked(lambda each=each, x=x, saved=saved: each.backward(x, saved, case))
        print(f"{each.name}: done", flush=True)


def marked(call: Callable[[], object]) -> None:
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    torch.cuda._sleep(1)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
