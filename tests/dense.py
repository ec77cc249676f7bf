"""Attention written down once more, without segments, pieces or kernels: the whole matrix, and torch's autograd."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["dense_attention", "visible"]


def visible(
    queries: Tensor, keys: Tensor, causal: bool, window: tuple[int, int], cu_seqlens: Sequence[int] | None
) -> Tensor:
    """Who sees whom, by positions in the whole sequence: bool [queries, keys]."""
    i, j = queries[:, None], keys[None, :]
    seen = (j <= i) if causal else torch.ones(len(queries), len(keys), dtype=torch.bool)
    left, right = window
    if left >= 0:
        seen = seen & (j >= i - left)
    if right >= 0:
        seen = seen & (j <= i + right)
    if cu_seqlens is not None:
        both = torch.zeros_like(seen)
        for start, end in pairwise(cu_seqlens):
            both |= (start <= i) & (i < end) & (start <= j) & (j < end)
        seen = seen & both
    return seen


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, sinks: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """out [B, S, H, E] and lse [B, H, S]; differentiable."""
    heads, groups = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(heads // groups, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:3], 1)), -1)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)[..., : k.shape[1]]
    return torch.einsum("bhij,bjhe->bihe", weights, v), scores.masked_fill(blind, 0.0).logsumexp(-1).masked_fill(
        blind[..., 0], -torch.inf
    )
