"""ring_attention: exact attention over a sequence that is cut across ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.checks import refuse_unsupported
from ringattn.documents import CuSeqlens, Documents
from ringattn.mask import Mask, WindowSize, make_mask
from ringattn.operators import attend
from ringattn.preparation import EXECUTORS, Settings
from ringattn.ranks import group_name

__all__ = ["ring_attention"]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    layout: str = "zigzag",
    causal: bool = False,
    window_size: WindowSize = None,
    cu_seqlens: CuSeqlens | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    seq_len: int | None = None,
    balance: Mask | None = None,
    kernel: str = "auto",
    executor: str = "auto",
    deterministic: bool | None = None,
    return_lse: bool = False,
    **unsupported: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys and values of all ranks. Collective; differentiable.

    Equal to `softmax(softmax_scale * Q K^T, masked) V` on the whole sequence (Ring Attention, arXiv:2310.01889).

    Args:
        q (Tensor): [B, L, H, D] this rank's queries; fp16, bf16, fp32 or fp64.
        k (Tensor): [B, L, G, D] its keys; H is a multiple of G (grouped-query attention).
        v (Tensor): [B, L, G, E] its values.
        group: the ranks that share the sequence: a ProcessGroup, a 1-D DeviceMesh, or None for all ranks (this
            process alone where torch.distributed is not initialised).
        layout: which rank holds which token: "contiguous", "zigzag", "striped" or "balanced"; see
            `ContextParallel.shard`.
        causal: a query sees keys at its own global position and before.
        window_size: (left, right) as in flash-attn: a query sees that many keys before and after its own position,
            -1 for no limit. With causal, one number n is short for (n - 1, 0): the last n keys, its own among them.
        cu_seqlens: cumulative lengths of the documents packed into the whole sequence (not this rank's part), as in
            flash-attn's varlen functions: integers that begin with 0. Tokens see their own document only; those after
            the last one are padding, which sees nothing. Holds for every row of the batch. Pass the same tensor to
            every layer: it is read, and if it is on a GPU waited for, once.
        sinks (Tensor): [H] a learnt logit per head that takes its share of every softmax and gives nothing
            (StreamingLLM, arXiv:2309.17453; GPT-OSS). Its gradient is this rank's part: sum it over the ranks, as that
            of any weight.
        softcap: scores become softcap * tanh(score / softcap), as in flash-attn and Gemma 2; 0 or None for no cap.
        softmax_scale: factor on the scores, before a cap; D ** -0.5 unless given.
        seq_len: tokens of the whole sequence; L * ranks unless given, so needed where it does not divide.
        balance: what the layout "balanced" balances: a causality and a window; causal unless given. See
            `ContextParallel`.
        kernel: "auto", or a name of `ringattn.kernels.registry.KERNELS`; a name never falls back to another.
        executor: "ring", "gather" or "pull", or "auto" for the one that `ringattn.cost` predicts to be fastest.
        deterministic: gradients are the same bits at every run, for which some kernels take longer; as
            `torch.use_deterministic_algorithms` says, at the time of the forward, unless given. out is so always.
        return_lse: return (out, lse).

    Returns:
        out [B, L, H, E] in the dtype of q; with `return_lse` also lse [B, H, L], natural log, fp32 (fp64 for fp64
        inputs), sinks included. A query that sees nothing has out 0 and lse -inf, or its sink.

    Raises:
        ValueError, TypeError: shapes, dtypes or names that do not fit.
        NotImplementedError: an option or an input that is not computed.
        RankDisagreement: ranks called with different configurations; raised on every rank.
        TransportError: a rank did not answer in time.
    """
    refuse_unsupported(unsupported)
    if executor not in ("auto", *EXECUTORS):
        raise ValueError(f"got executor={executor!r}; choose one of {', '.join(('auto', *EXECUTORS))}")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    cap = float(softcap or 0.0)
    if not 0.0 <= cap < math.inf:
        raise ValueError(f"got softcap={softcap}; pass a positive number, or 0 for no cap")
    if isinstance(cu_seqlens, Documents):
        cu_seqlens = cu_seqlens.tensor
    elif cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
        cu_seqlens = torch.as_tensor(cu_seqlens)
    windows = (*make_mask(causal, window_size).window, *(balance or Mask(causal=True)).window)
    fixed = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
    settings = Settings(group_name(group), layout, seq_len, causal, scale, kernel, executor, *windows, cap, fixed)
    out, lse = attend(q, k, v, sinks, cu_seqlens, settings)
    return (out, lse) if return_lse else out
