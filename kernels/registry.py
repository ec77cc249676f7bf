"""Which kernel runs: by name, or the first in order of preference that takes the inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .aten import AtenKernel, CudnnKernel
from .hopper import HopperKernel
from .interface import Capped, Kernel
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


def choose_kernel(
    name: str, q: Tensor, k: Tensor, v: Tensor, *, softcap: float = 0.0, deterministic: bool | None = None
) -> Choice:
    """The kernel called `name`, or for "auto" the preferred one; it caps scores at `softcap`, unless that is 0, and its
    gradients are the same bits at every run if `deterministic`, or where that is None, if torch is told so when they
    are computed. Depends on device, dtype, head dims and these options only, never on lengths, so that every rank of a
    group chooses alike.

    Raises:
        ValueError: no kernel has that name.
        NotImplementedError: the kernel asked for by name cannot take these inputs; there is no silent fallback.
    """

    def refusal(kernel: Kernel) -> str | None:
        if softcap and not kernel.caps_scores:
            return "it does not cap scores"
        by_torch = isinstance(kernel, AtenKernel) and q.is_cuda
        if deterministic and by_torch and not torch.are_deterministic_algorithms_enabled():
            return "its gradients are sums in any order, unless torch.use_deterministic_algorithms(True)"
        return kernel.refuses(q, k, v)

    def chosen(kernel: Kernel, reason: str) -> Choice:
        if deterministic is not None and hasattr(kernel, "ordered"):
            kernel = kernel.ordered(deterministic)  # pyright: ignore[reportAttributeAccessIssue]
        return Choice(Capped(kernel, softcap) if softcap else kernel, reason)

    if name == "auto":
        passed_over = []
        for candidate in PREFERENCE:
            refused = refusal(KERNELS[candidate])
            if refused is None:
                return chosen(KERNELS[candidate], "; ".join(passed_over) or f"first choice on {q.device.type}")
            passed_over.append(f"{candidate} refused: {refused}")
        raise AssertionError("the reference kernel refuses nothing")
    if name not in KERNELS:
        raise ValueError(f"got kernel={name!r}; choose one of {', '.join(('auto', *KERNELS))}")
    refused = refusal(KERNELS[name])
    if refused is not None:
        raise NotImplementedError(f"kernel={name!r} cannot take these inputs: {refused}; use kernel='auto'")
    return chosen(KERNELS[name], "asked for by name")
