"""Eager attention over segments: the specification that every other kernel is held against.

    S = scale Q K^T where visible, -inf elsewhere        lse = log sum exp S        P = exp(S - lse)        out = P V
    dV = P^T dO        dS = P (dO V^T - delta)        dQ = scale dS K        dK = scale dS^T Q

With a cap on scores, s = cap tanh(scale q k / cap), and dS takes the factor 1 - (s / cap)^2.

Everything is computed in fp32, or in fp64 for fp64 inputs, one key/value head at a time; memory is O(L M).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import accumulate_dtype, nothing_seen, row_delta, settled
from .merge import merge_
from .segments import Segments

__all__ = ["ReferenceKernel", "visible_pairs"]


def visible_pairs(segments: Segments, rows: int, keys: int, device: torch.device | None = None) -> Tensor:
    """The mask that a list of segments stands for: bool [rows, keys]."""
    visible = torch.zeros(rows, keys, dtype=torch.bool, device=device)
    for q_start, q_len, k_start, k_len, offset, window in segments:
        i = torch.arange(q_len, device=device)[:, None]
        j = torch.arange(k_len, device=device)[None, :]
        visible[q_start : q_start + q_len, k_start : k_start + k_len] |= (j <= i + offset) & (j > i + offset - window)
    return visible


def head_group(x_BLHD: Tensor, group: int, groups: int) -> Tensor:
    """The heads of one key/value head, [B, H/G, L, D], in the accumulate dtype."""
    heads = x_BLHD.shape[2] // groups
    return x_BLHD[:, :, group * heads : (group + 1) * heads].transpose(1, 2).to(accumulate_dtype(x_BLHD))


def cap(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


class ReferenceKernel:
    """Attention spelled out in torch, on any device, dtype, head count and head dim."""

    name = "reference"
    reads_delta = True
    caps_scores = True
    row_delta = staticmethod(row_delta)
    settled = staticmethod(settled)

    def refuses(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return None

    def forward(self, q, k, v, segments, *, scale, running=None, out_dtype=None, softcap=0.0) -> tuple[Tensor, Tensor]:
        out, lse = running or nothing_seen(q, v)
        visible = visible_pairs(segments, q.shape[1], k.shape[1], q.device)
        groups = k.shape[2]
        outs, lses = [], []
        for g in range(groups):
            q_BRLD, k_B1MD, v_B1ME = (head_group(x, g, groups) for x in (q, k, v))
            scores = cap(q_BRLD @ k_B1MD.mT * scale, softcap).masked_fill(~visible, -torch.inf)
            lse_part = scores.logsumexp(-1)
            anchor = lse_part.masked_fill(lse_part == -torch.inf, 0.0)
            outs.append((scores - anchor.unsqueeze(-1)).exp() @ v_B1ME)
            lses.append(lse_part)
        merge_(out, lse, torch.cat(outs, 1).transpose(1, 2), torch.cat(lses, 1))
        return out.to(out_dtype or out.dtype), lse

    def backward(
        self, dout, q, k, v, out, lse, delta, segments, *, scale, dq=None, dk=None, dv=None, out_dtype=None, softcap=0.0
    ):
        visible = visible_pairs(segments, q.shape[1], k.shape[1], q.device)
        groups = k.shape[2]
        dqs, dks, dvs = [], [], []
        for g, (lse_BRL, delta_BRL) in enumerate(zip(lse.chunk(groups, 1), delta.chunk(groups, 1), strict=True)):
            q_BRLD, dout_BRLE, k_B1MD, v_B1ME = (head_group(x, g, groups) for x in (q, dout, k, v))
            scores = cap(q_BRLD @ k_B1MD.mT * scale, softcap)
            p = (scores - lse_BRL.unsqueeze(-1)).masked_fill(~visible, -torch.inf).exp()
            ds = p * (dout_BRLE @ v_B1ME.mT - delta_BRL.unsqueeze(-1)) * scale
            if softcap:
                ds *= 1 - (scores / softcap) ** 2
            dqs.append(ds @ k_B1MD)
            dks.append((ds.mT @ q_BRLD).sum(1, keepdim=True))
            dvs.append((p.mT @ dout_BRLE).sum(1, keepdim=True))
        parts = (torch.cat(x, 1).transpose(1, 2) for x in (dqs, dks, dvs))
        dq, dk, dv = (
            part if total is None else total.add_(part) for total, part in zip((dq, dk, dv), parts, strict=True)
        )
        return dq, dk, dv
