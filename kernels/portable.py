"""The portable kernels behind the interface: FlashAttention-2 in Triton, on any GPU that Triton serves.

Nothing here imports Triton before a kernel runs, so that `import ringattn` works without it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .interface import accumulate_dtype, nothing_seen

__all__ = ["TritonKernel", "module"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def module(name: str) -> Any:
    """A module of this folder, imported when it is first needed; an import statement would look for it each time."""
    return import_module(f".{name}", __package__)


class TritonKernel:
    """FlashAttention-2 over segments in plain Triton. Deterministic: the same inputs give the same bits."""

    name = "triton"
    reads_delta = True
    caps_scores = True

    def refuses(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed"
        if q.dtype not in DTYPES:
            return f"it takes bfloat16, float16 and float32, not {q.dtype}"
        if max(q.shape[-1], v.shape[-1]) > 256:
            return f"head dims go up to 256, got {q.shape[-1]} for q and k, {v.shape[-1]} for v"
        if q.device.type != "cuda":
            return f"Triton kernels run on GPUs, not on {q.device.type}"
        if torch.version.cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
            return "it needs compute capability 8.0, got {}.{}".format(*torch.cuda.get_device_capability(q.device))
        return None

    def forward(self, q, k, v, segments, *, scale, running=None, out_dtype=None, softcap=0.0):
        out_dtype = out_dtype or accumulate_dtype(q)
        if not segments:
            out, lse = running or nothing_seen(q, v)
            return out.to(out_dtype), lse
        return module("triton_launch").forward(q, k, v, segments, scale, running, out_dtype, softcap)

    def row_delta(self, dout, out):
        return module("triton_launch").row_delta(dout, out)

    def settled(self, dq, own, parts, dtype, into=None, kept=None):
        return module("triton_settling").settled(dq, own, parts, dtype, into, kept)

    def backward(
        self, dout, q, k, v, out, lse, delta, segments, *, scale, dq=None, dk=None, dv=None, out_dtype=None, softcap=0.0
    ):
        if not segments:
            return tuple(
                x.new_zeros(x.shape, dtype=accumulate_dtype(x)) if total is None else total
                for x, total in ((q, dq), (k, dk), (v, dv))
            )
        launch = module("triton_launch")
        dk, dv = launch.key_gradients(dout, q, k, v, lse, delta, segments, scale, dk, dv, softcap)
        return launch.query_gradients(dout, q, k, v, lse, delta, segments, scale, dq, softcap), dk, dv
