"""What is refused, and what to do instead: bad input raises before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_inputs", "refuse_unsupported"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What other attention functions accept and this one does not compute: name -> (values that ask for nothing, advice).
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "dropout_p": ((0, 0.0), "train without attention dropout"),
    "attn_mask": ((None,), "masks are given by name: causal, window_size, cu_seqlens"),
    "position_ids": ((None,), "documents are given as cu_seqlens: ringattn.cu_seqlens_from_positions(position_ids)"),
    "alibi_slopes": ((None,), "use rotary positions: ContextParallel.positions gives them"),
    "cu_seqlens_q": ((None,), "queries and keys are the same tokens: pass cu_seqlens, of the whole sequence"),
    "cu_seqlens_k": ((None,), "queries and keys are the same tokens: pass cu_seqlens, of the whole sequence"),
}


def refuse_unsupported(options: dict[str, Any]) -> None:
    """Raises for options that would change the result and are not computed.

    Raises:
        NotImplementedError: a known option with a value that asks for something.
        TypeError: a name that nobody knows.
    """
    for name, value in options.items():
        if name not in UNSUPPORTED:
            raise TypeError(f"ring_attention() got an unexpected keyword argument {name!r}")
        neutral, advice = UNSUPPORTED[name]
        if not any(value is same or (not isinstance(value, Tensor) and value == same) for same in neutral):
            raise NotImplementedError(f"got {name}={value!r}, which ring_attention does not compute: {advice}")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> None:
    """Whether this rank can take part with these tensors.

    Raises:
        ValueError, TypeError, NotImplementedError: what was got, and what to do instead.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"got {shapes}; need (batch, tokens, heads, head_dim) each")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"got dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast q, k and v to one dtype")
    if q.dtype not in DTYPES:
        raise TypeError(f"got {q.dtype}; cast q, k and v to one of {', '.join(map(str, DTYPES))}")
    if not q.device == k.device == v.device:
        raise ValueError(f"got devices {q.device}, {k.device}, {v.device}; move q, k and v to one device")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"got {shapes}; the batch sizes must be equal")
    if not q.shape[1] == k.shape[1] == v.shape[1]:
        raise ValueError(f"got {shapes}; q, k and v must be shards of one sequence, equally many tokens each")
    if k.shape[2] != v.shape[2] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"got {shapes}; k and v must have equally many heads, and q a multiple of them")
    if q.shape[3] != k.shape[3] or 0 in (q.shape[3], v.shape[3]):
        raise ValueError(f"got {shapes}; q and k must have the same head dim, and none may be empty")
    if sinks is not None and (sinks.shape != q.shape[2:3] or not sinks.is_floating_point()):
        raise ValueError(
            f"got sinks {tuple(sinks.shape)} of {sinks.dtype} for {q.shape[2]} query heads; pass a logit per query head"
        )
    if sinks is not None and sinks.device != q.device:
        raise ValueError(f"got sinks on {sinks.device} and q on {q.device}; move them to one device")
