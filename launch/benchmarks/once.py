"""One forward and one backward of each of some local implementations, for Nsight Compute to look at.

    python -m ringattn.launch.benchmarks.once 1/32:8/128/8192/causal bf16 SEED ringattn-triton torch-cudnn ...

Everything before a call, compiling included, is outside the profiled ranges. In front of each call stands a kernel
called `MARKER`, so that a list of all kernels tells which call launched which.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from ..oracle import Case, Inputs, make_inputs
from .cases import DTYPES, named_case
from .implementations import Implementation, local_implementations

__all__ = ["MARKER", "main"]

MARKER = "spin_kernel"  # what torch.cuda._sleep launches


def main(case_text: str, dtype: str, seed: str, *names: str) -> None:
    case, known = named_case(case_text, DTYPES[dtype]), local_implementations()
    inputs = make_inputs(case, int(seed), "cuda")
    for name in names:
        show(known[name], known[name].prepare(inputs), case)


def show(each: Implementation, x: Inputs, case: Case) -> None:
    saved = each.forward(x, case)
    each.backward(x, saved, case)
    marked(lambda: each.forward(x, case))
    marked(lambda: each.backward(x, saved, case))


def marked(call: Callable[[], object]) -> None:
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    torch.cuda._sleep(1)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
