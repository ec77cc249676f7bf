"""The entry points of the package flash-attn, served by torch's own kernels where it is not installed.

ring-flash-attention calls four functions of it. Two take and give [B, L, H, D] and lse [B, H, L]; here they are calls
of `AtenKernel` or `CudnnKernel`, which add nothing to torch's kernels but a transpose of views. Two are for packed
documents and take [L, H, D]; here they are torch's FlashAttention-2, whatever the kernel.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.aten import AtenKernel
from ringattn.kernels.registry import KERNELS

__all__ = ["installed", "serve"]

aten = torch.ops.aten
INTERFACE = "flash_attn.flash_attn_interface"


def installed() -> bool:
    """Whether the package itself is there."""
    return find_spec("flash_attn") is not None and find_spec(INTERFACE) is not None


def refuse(**options: Any) -> None:
    """Raises for an option that asks for something."""
    asked = {name: value for name, value in options.items() if value not in (None, 0, 0.0, -1, False)}
    if asked:
        raise NotImplementedError(f"flash-attn is not installed, and its substitute does not compute {asked}")


def functions(kernel: AtenKernel) -> dict[str, Any]:
    """The functions by name, over one kernel."""

    def _flash_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, dropout_p=0.0, softmax_scale=None, causal=False, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        refuse(
            dropout=dropout_p, window=window_size_left, right_window=window_size_right, softcap=softcap,
            alibi=alibi_slopes, softmax=return_softmax,
        )  # fmt: skip
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out, lse = kernel.attend(q, k, v, causal, scale)
        return out, lse, None, None

    def _flash_attn_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, dropout_p=0.0, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, deterministic=False, rng_state=None,
    ):  # fmt: skip
        refuse(
            dropout=dropout_p, window=window_size_left, right_window=window_size_right, softcap=softcap,
            alibi=alibi_slopes, deterministic=deterministic,
        )  # fmt: skip
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        grads = kernel.differentiate(dout, q, k, v, out, softmax_lse, causal, scale)
        for given, grad in zip((dq, dk, dv), grads, strict=True):
            given.copy_(grad)

    def _flash_attn_varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p=0.0, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        refuse(dropout=dropout_p, softcap=softcap, alibi=alibi_slopes, softmax=return_softmax)
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False, scale=softmax_scale,
            window_size_left=window_size_left, window_size_right=window_size_right,
        )  # fmt: skip
        return out, lse, None, None

    def _flash_attn_varlen_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        deterministic=False, rng_state=None,
    ):  # fmt: skip
        refuse(dropout=dropout_p, softcap=softcap, alibi=alibi_slopes, deterministic=deterministic)
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # read with dropout only
        grads = aten._flash_attention_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, seed,
            seed[:0], scale=softmax_scale, window_size_left=window_size_left, window_size_right=window_size_right,
        )  # fmt: skip
        for given, grad in zip((dq, dk, dv), grads, strict=True):
            given.copy_(grad)

    return {
        "_flash_attn_forward": _flash_attn_forward,
        "_flash_attn_backward": _flash_attn_backward,
        "_flash_attn_varlen_forward": _flash_attn_varlen_forward,
        "_flash_attn_varlen_backward": _flash_attn_varlen_backward,
    }


def serve(kernel: str) -> None:
    """Makes `import flash_attn.flash_attn_interface` work in this process, for good."""
    chosen = KERNELS[kernel]
    assert isinstance(chosen, AtenKernel)
    if find_spec("flash_attn") is None:
        sys.modules["flash_attn"] = ModuleType("flash_attn")
    module = ModuleType(INTERFACE)
    vars(module).update(functions(chosen))
    sys.modules[INTERFACE] = module
