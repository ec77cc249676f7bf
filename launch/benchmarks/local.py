"""Local attention as an implementation's users call it, on one device: what that is.

All get the same tensors, [B, L, H, D] and contiguous, as a model's projections leave them; who wants heads first gets
transposed views of them, as its users pass them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..oracle import Case, Inputs
from .masks import mask_name

__all__ = ["Differentiated", "Implementation", "Saved", "other_mask"]

Saved = tuple[Any, ...]  # out first


def other_mask(case: Case) -> str | None:
    """What those say that are called with `causal` and nothing else."""
    return None if mask_name(case) in ("causal", "none") else f"is not called with the mask {mask_name(case)} here"


class Implementation:
    """One way to compute attention on one device. Instances travel to processes, so they hold names only."""

    name: str
    heads_first = False  # takes and gives [B, H, L, D], views of [B, L, H, D]
    any_mask = False  # takes windows and documents, too

    def refuses(self, x: Inputs, case: Case) -> str | None:
        """Why it cannot compute such a case here, or None if it can."""
        if not x.q.is_cuda:
            return f"runs on CUDA devices, not on {x.q.device.type}"
        if case.documents is not None and case.batch > 1:
            return "takes packed documents in one row only"
        return None if self.any_mask else other_mask(case)

    def prepare(self, x: Inputs, case: Case) -> Inputs:
        """Inputs as its users hold them."""
        return Inputs(*(self.turned(tensor) for tensor in x))

    def turned(self, x: Tensor) -> Tensor:
        """From [B, L, H, D] to its layout, and back."""
        return x.transpose(1, 2) if self.heads_first else x

    def forward(self, x: Inputs, case: Case) -> Saved:
        """out, and all that the backward wants."""
        raise NotImplementedError

    def backward(self, x: Inputs, saved: Saved, case: Case) -> tuple[Tensor, ...]:
        """dq, dk and dv in the dtype of the inputs."""
        raise NotImplementedError


class Differentiated(Implementation):
    """One that offers a differentiable function and no backward of its own."""

    def prepare(self, x: Inputs, case: Case) -> Inputs:
        q, k, v, dout = (tensor.detach() for tensor in super().prepare(x, case))
        return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)

    def backward(self, x: Inputs, saved: Saved, case: Case) -> tuple[Tensor, ...]:
        return torch.autograd.grad(saved[0], (x.q, x.k, x.v), x.dout, retain_graph=True)
