"""Attention sinks: a learnt logit per head that takes its share of every softmax and has no value.

A row that has seen its sink s and nothing else has out = 0 and lse = s. That is a partial result like any other, so
rows start from it, and no kernel and no executor knows of sinks. With the lse of everything, sink included,

    p = exp(s - lse)        ds = p (dlse - dout . out) = -p delta

because out falls by p out where s rises, and delta is dout . out less the gradient of lse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn.kernels.interface import nothing_seen

__all__ = ["seen_by_sinks", "sink_gradients"]


def seen_by_sinks(sinks_H: Tensor, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of rows that have seen their head's sink: [B, L, H, E] and [B, H, L]."""
    out_BLHE, lse_BHL = nothing_seen(q, v)
    return out_BLHE, lse_BHL.copy_(sinks_H[:, None].expand_as(lse_BHL))


def sink_gradients(sinks_H: Tensor, lse_BHL: Tensor, delta_BHL: Tensor) -> Tensor:
    """What these rows contribute to the gradient of the sinks: [H], in their dtype."""
    p_BHL = torch.exp(sinks_H.to(lse_BHL.dtype)[:, None] - lse_BHL)
    return -(p_BHL * delta_BHL).sum((0, 2)).to(sinks_H.dtype)
