"""Local attention as each implementation's users call it: ours, torch's, FlashAttention-4's.

All get the same tensors, [B, L, H, D] and contiguous, as a model's projections leave them; who wants heads first gets
transposed views of them, as its users pass them. A forward returns out and all that the backward wants; a backward
returns dq, dk, dv in the dtype of the inputs.
"""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ringattn.kernels.registry import KERNELS
from ringattn.kernels.segments import Segments
from ringattn.plan import make_plan

from ..oracle import Case, Inputs
from .masks import mask_name

__all__ = ["BY_TORCH", "Implementation", "local_implementations", "other_mask"]

aten = torch.ops.aten
Saved = tuple[Any, ...]  # out first


def other_mask(case: Case) -> str | None:
    """What those say that are called with `causal` and nothing else."""
    return None if mask_name(case) in ("causal", "none") else f"is not called with the mask {mask_name(case)} here"


class Implementation:
    """One way to compute attention on one device. Instances travel to processes, so they hold names only."""

    name: str
    heads_first = False  # takes and gives [B, H, L, D], views of [B, L, H, D]

    def refuses(self, x: Inputs, case: Case) -> str | None:
        """Why it cannot compute such a case here, or None if it can."""
        if not x.q.is_cuda:
            return f"runs on CUDA devices, not on {x.q.device.type}"
        return other_mask(case)

    def prepare(self, x: Inputs, case: Case) -> Inputs:
        """Inputs as its users hold them."""
        return Inputs(*(self.turned(tensor) for tensor in x))

    def turned(self, x: Tensor) -> Tensor:
        """From [B, L, H, D] to its layout, and back."""
        return x.transpose(1, 2) if self.heads_first else x

    def forward(self, x: Inputs, case: Case) -> Saved:
        raise NotImplementedError

    def backward(self, x: Inputs, saved: Saved, case: Case) -> tuple[Tensor, ...]:
        raise NotImplementedError


class Ours(Implementation):
    """A kernel of this package over the one segment that is the whole sequence."""

    def __init__(self, kernel: str, deterministic: bool = False):
        self.kernel = kernel
        self.name = f"ringattn-{kernel}" + "-deterministic" * deterministic
        self.options = {"deterministic": True} if deterministic else {}

    def refuses(self, x: Inputs, case: Case) -> str | None:
        return KERNELS[self.kernel].refuses(x.q, x.k, x.v)

    def segments(self, case: Case) -> Segments:
        return make_plan("contiguous", case.seq_len, 1, **case.mask).segments(0, 0)

    def forward(self, x: Inputs, case: Case) -> Saved:
        segments, scale = self.segments(case), case.head_dim**-0.5
        out, lse = KERNELS[self.kernel].forward(x.q, x.k, x.v, segments, scale=scale, out_dtype=x.q.dtype)
        return out, lse, segments, scale

    def backward(self, x: Inputs, saved: Saved, case: Case) -> tuple[Tensor, ...]:
        out, lse, segments, scale = saved
        delta = KERNELS[self.kernel].row_delta(x.dout, out)
        options = {"scale": scale} | self.options
        grads = KERNELS[self.kernel].backward(x.dout, x.q, x.k, x.v, out, lse, delta, segments, **options)
        return tuple(grad.to(x.q.dtype) for grad in grads)


class TorchFlash(Implementation):
    """FlashAttention-2 as torch ships it; it takes grouped keys and values as they are."""

    name = "torch-fa2"
    heads_first = True

    def forward(self, x: Inputs, case: Case) -> Saved:
        return aten._scaled_dot_product_flash_attention(x.q, x.k, x.v, 0.0, case.causal)

    def backward(self, x: Inputs, saved: Saved, case: Case) -> tuple[Tensor, ...]:
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
        return aten._scaled_dot_product_flash_attention_backward(
            x.dout, x.q, x.k, x.v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, case.causal, seed, offset
        )


class TorchCudnn(Implementation):
    """cuDNN's fused attention through torch; it takes grouped keys and values as they are."""

    name = "torch-cudnn"
    heads_first = True

    def forward(self, x: Inputs, case: Case) -> Saved:
        return aten._scaled_dot_product_cudnn_attention(x.q, x.k, x.v, None, True, 0.0, case.causal, False)

    def backward(self, x: Inputs, saved: Saved, case: Case) -> tuple[Tensor, ...]:
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
        return aten._scaled_dot_product_cudnn_attention_backward(
            x.dout, x.q, x.k, x.v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, case.causal
        )


BY_TORCH = {"aten": TorchFlash(), "cudnn": TorchCudnn()}  # by the names of our kernels that call the same


class Differentiated(Implementation):
    """One that offers a differentiable function and no backward of its own."""

    def prepare(self, x: Inputs, case: Case) -> Inputs:
        q, k, v, dout = super().prepare(x, case)
        return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)

    def backward(self, x: Inputs, saved: Saved, case: Case) -> tuple[Tensor, ...]:
        return torch.autograd.grad(saved[0], (x.q, x.k, x.v), x.dout, retain_graph=True)


class TorchMath(Differentiated):
    """Standard attention, the whole matrix in memory; torch repeats grouped keys and values for it."""

    name = "torch-math"
    heads_first = True
    copies = 6  # of the matrix in fp32, forward and backward together

    def refuses(self, x: Inputs, case: Case) -> str | None:
        if not x.q.is_cuda:
            return other_mask(case)
        needed = self.copies * 4 * case.batch * case.q_heads * case.seq_len**2
        allowed = torch.cuda.get_device_properties(x.q.device).total_memory // 2
        return f"needs {needed / 2**30:.0f} GiB, more than half of this GPU" if needed > allowed else other_mask(case)

    def forward(self, x: Inputs, case: Case) -> Saved:
        with sdpa_kernel(SDPBackend.MATH):
            return (scaled_dot_product_attention(x.q, x.k, x.v, is_causal=case.causal, enable_gqa=True),)


class FlashAttention4(Differentiated):
    """FlashAttention-4, where its package is installed."""

    name = "fa4"

    def refuses(self, x: Inputs, case: Case) -> str | None:
        try:
            import_module("flash_attn.cute.interface")
        except ImportError as error:
            return f"not installed ({error})"
        return super().refuses(x, case)

    def forward(self, x: Inputs, case: Case) -> Saved:
        result = import_module("flash_attn.cute.interface").flash_attn_func(x.q, x.k, x.v, causal=case.causal)
        return result if isinstance(result, tuple) else (result,)  # releases differ: with lse or without


def local_implementations() -> dict[str, Implementation]:
    """All that this bench knows, by name: our kernels first, then the peers. A kernel whose backward can be told to be
    deterministic appears in both ways."""
    ours = [Ours(name) for name in KERNELS]
    ours += [
        Ours(name, True) for name, each in KERNELS.items() if "deterministic" in signature(each.backward).parameters
    ]
    return {each.name: each for each in (*ours, TorchFlash(), TorchCudnn(), TorchMath(), FlashAttention4())}
