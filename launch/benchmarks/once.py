"""One call of a local implementation, for Nsight Compute to look at.

    python -m ringattn.launch.benchmarks.once ringattn-triton 1/32:8/128/8192/causal bf16 forward SEED

Everything before the call, compiling included, is outside the profiled range.
"""

from __future__ import annotations

import sys

import torch

from ..oracle import make_inputs
from .cases import DTYPES, named_case
from .implementations import local_implementations

__all__ = ["main"]


def main(name: str, case_text: str, dtype: str, which: str, seed: str) -> None:
    each, case = local_implementations()[name], named_case(case_text, DTYPES[dtype])
    x = each.prepare(make_inputs(case, int(seed), "cuda"))
    saved = each.forward(x, case)
    each.backward(x, saved, case)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    if which == "forward":
        each.forward(x, case)
    else:
        each.backward(x, saved, case)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
