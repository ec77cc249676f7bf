"""AdamW, its learning rate, and gradients that are summed and clipped as one buffer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import settings

__all__ = ["Gradients", "adamw", "learning_rate"]


def adamw(model: nn.Module, chosen: settings.Optimizer) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the scales of norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": chosen.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=chosen.lr, betas=(chosen.beta1, chosen.beta2), eps=chosen.eps, fused=True)


def learning_rate(step: int, steps: int, chosen: settings.Optimizer) -> float:
    """Of step 1, 2, ... steps: linear up to `lr` at step `warmup`, then half a cosine down to its final share.

    Example:
        >>> [round(learning_rate(n, 6, settings.Optimizer(lr=1.0, warmup=2)), 3) for n in range(1, 7)]
        [0.5, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    if step <= chosen.warmup:
        return chosen.lr * step / chosen.warmup
    done = (step - chosen.warmup) / (steps - chosen.warmup)
    return chosen.lr * (chosen.final_share + (1 - chosen.final_share) * (1 + math.cos(math.pi * done)) / 2)


class Gradients:
    """Every parameter's gradient, as a view of one flat buffer.

    One all-reduce sums them over ranks and one product clips them. The sum is what a cut sequence needs: each
    rank's loss is its part of one global mean, so gradients add up; DistributedDataParallel would average.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes), device=parameters[0].device)
        for parameter, view in zip(parameters, self.flat.split(sizes), strict=True):
            parameter.grad = view.view_as(parameter)

    def clear(self) -> None:
        self.flat.zero_()

    def sum_over_ranks(self) -> None:
        if dist.is_initialized():
            dist.all_reduce(self.flat)

    def clip(self, largest: float) -> Tensor:
        """Scale to a norm of at most `largest`; returns the norm before."""
        norm = self.flat.norm()
        self.flat.mul_((largest / norm.clamp_min(1e-12)).clamp_max(1.0))
        return norm
