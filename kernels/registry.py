"""Which kernel runs: by name, or the first in order of preference that takes the inputs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .aten import AtenKernel, CudnnKernel
from .hopper import HopperKernel
from .interface import Kernel
from .portable import TritonKernel
from .reference import ReferenceKernel

__all__ = ["KERNELS", "Choice", "choose_kernel"]

ALL: tuple[Kernel, ...] = (HopperKernel(), TritonKernel(), AtenKernel(), CudnnKernel(), ReferenceKernel())
KERNELS = {kernel.name: kernel for kernel in ALL}
PREFERENCE = ("hopper", "triton", "aten", "reference")


class Choice(NamedTuple):
    """A kernel, and why it was taken."""

    kernel: Kernel
    reason: str


def choose_kernel(name: str, q: Tensor, k: Tensor, v: Tensor) -> Choice:
    """The kernel called `name`, or for "auto" the preferred one. Depends on device, dtype and head dims only,
    never on lengths, so that every rank of a group chooses alike.

    Raises:
        ValueError: no kernel has that name.
        NotImplementedError: the kernel asked for by name cannot take these inputs; there is no silent fallback.
    """
    if name == "auto":
        passed_over = []
        for candidate in PREFERENCE:
            refusal = KERNELS[candidate].refuses(q, k, v)
            if refusal is None:
                reason = f"first choice on {q.device.type}" if not passed_over else "; ".join(passed_over)
                return Choice(KERNELS[candidate], reason)
            passed_over.append(f"{candidate} refused: {refusal}")
        raise AssertionError("the reference kernel refuses nothing")
    if name not in KERNELS:
        raise ValueError(f"got kernel={name!r}; choose one of {', '.join(('auto', *KERNELS))}")
    refusal = KERNELS[name].refuses(q, k, v)
    if refusal is not None:
        raise NotImplementedError(f"kernel={name!r} cannot take these inputs: {refusal}; use kernel='auto'")
    return Choice(KERNELS[name], "asked for by name")
