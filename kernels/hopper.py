"""The Hopper kernels behind the interface: warp-specialised, in Gluon, for compute capability 9.0 and 16-bit inputs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .interface import Arrival, accumulate_dtype
from .portable import TritonKernel, module

__all__ = ["HopperKernel"]

DTYPES = (torch.bfloat16, torch.float16)
SOURCES = 7  # that a backward delivers gradients to, at most: a node of eight
WIDEST = 128  # head dim of the backward; dK and dV of wider ones do not fit into registers
UNIT = 8  # columns of 16 bits that a tensor descriptor counts in


class HopperKernel(TritonKernel):
    """The portable kernels, where there is none of its own: in the backward, for head dims over 128.

    The same inputs give the same bits, but for dq: programs add to it in any order. They do so in a fixed one if
    `deterministic`, or where that is None, if torch is told to be.
    """

    name = "hopper"
    caps_scores = False
    waits = True  # forward takes an `Arrival`; see also `delivers`
    yields = True  # forward takes a `margin`

    def __init__(self, deterministic: bool | None = None):
        self.deterministic = deterministic

    def ordered(self, deterministic: bool) -> HopperKernel:
        """This kernel, adding to dq in a fixed order or not, whatever torch is told."""
        return HopperKernel(deterministic)

    def delivers(self, q: Tensor, v: Tensor, sources: int) -> bool:
        """Whether backward takes an `Arrival` from so many, and stores gradients of what arrives at home."""
        return q.shape[-1] == v.shape[-1] and not too_wide(q, v) and sources <= SOURCES

    @property
    def in_order(self) -> bool:
        return torch.are_deterministic_algorithms_enabled() if self.deterministic is None else self.deterministic

    def refuses(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed"
        if q.dtype not in DTYPES:
            return f"it takes bfloat16 and float16, not {q.dtype}"
        if max(q.shape[-1], v.shape[-1]) > 256:
            return f"head dims go up to 256, got {q.shape[-1]} for q and k, {v.shape[-1]} for v"
        if q.shape[-1] % UNIT or v.shape[-1] % UNIT:
            return f"head dims are multiples of {UNIT}, got {q.shape[-1]} for q and k, {v.shape[-1]} for v"
        if q.device.type != "cuda" or torch.version.hip:
            return f"it runs on Hopper GPUs, not on {'ROCm' if torch.version.hip else q.device.type}"
        if torch.cuda.get_device_capability(q.device) != (9, 0):
            return "it needs compute capability 9.0, got {}.{}".format(*torch.cuda.get_device_capability(q.device))
        return None

    def forward(
        self,
        q,
        k,
        v,
        segments,
        *,
        scale,
        running=None,
        out_dtype=None,
        arrival: Arrival | None = None,
        margin: int = 0,
        into: tuple[Tensor, Tensor] | None = None,
    ):
        """`Kernel.forward`. A program stays on its multiprocessor until the end; `margin` multiprocessors get none, so
        that another kernel, NCCL's say, can run beside this one. Without `running`, out and lse may be told where to
        be."""
        launch = module("hopper_forward_launch")
        dtype = out_dtype or accumulate_dtype(q)
        return launch.forward(q, k, v, segments, scale, running, dtype, arrival, margin, into)

    def begin(self, dout, q, v, out, lse, dlse, *, scale) -> dict[str, Any] | None:
        """What the launches of one backward share, as options of `backward`, delta among them; it needs no keys. None
        if there is nothing of that kind."""
        if too_wide(q, v):
            return None
        dq, pieces = module("hopper_backward_launch").begin(q, v, lse, dlse, scale, product=(dout, out))
        return {"dq": dq, "pieces": pieces}

    def backward(
        self, dout, q, k, v, out, lse, delta, segments, *, scale, dq=None, dk=None, dv=None, out_dtype=None,
        pieces=None, arrival: Arrival | None = None, homes: Sequence[Tensor] = (),
    ):  # fmt: skip
        """`Kernel.backward`; `pieces` comes from `begin`, and so does the first dq, and delta is not looked at.

        With `arrival`, dk and dv are those of own keys. `homes` [2, B, keys, G, D] are where dk and dv of each source's
        keys belong, of the first ones in its slot: contiguous, in fp32, and possibly another GPU's memory. They are
        there when the launch is over, those of every 128 keys of which any is seen; what follows from keys that have
        not come in time is NaN."""
        if not segments or too_wide(q, v):
            return super().backward(dout, q, k, v, out, lse, delta, segments, scale=scale, dq=dq, dk=dk, dv=dv)
        how = self.in_order, out_dtype, pieces, arrival, homes
        return module("hopper_backward_launch").backward(dout, q, k, v, lse, delta, segments, scale, dq, dk, dv, *how)


def too_wide(q: Tensor, v: Tensor) -> bool:
    """Whether the portable backward serves such heads."""
    return max(q.shape[-1], v.shape[-1]) > WIDEST
