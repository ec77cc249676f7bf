"""Local attention as torch ships it: FlashAttention-2, cuDNN's, and the whole matrix in memory."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..oracle import Case, Inputs
from .local import Differentiated, Implementation, Saved, other_mask

__all__ = ["BY_TORCH", "TorchCudnn", "TorchFlash", "TorchMath", "flash_mask"]

aten = torch.ops.aten


class TorchFlash(Implementation):
    """FlashAttention-2 as torch ships it; it takes grouped keys and values as they are.

    Windows and documents are none of scaled_dot_product_attention's options, so for them the operator beneath it is
    called, as torch.nn.attention.varlen does.
    """

    name = "torch-fa2"
    heads_first = True
    any_mask = True

    def forward(self, x: Inputs, case: Case) -> Saved:
        if other_mask(case):
            return self.masked(x, case)
        return aten._scaled_dot_product_flash_attention(x.q, x.k, x.v, 0.0, case.causal)

    def backward(self, x: Inputs, saved: Saved, case: Case) -> tuple[Tensor, ...]:
        if other_mask(case):
            return self.masked_backward(x, saved, case)
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
        return aten._scaled_dot_product_flash_attention_backward(
            x.dout, x.q, x.k, x.v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, case.causal, seed, offset
        )

    def masked(self, x: Inputs, case: Case) -> Saved:
        q, k, v = (flash_layout(each, case) for each in x[:3])
        cum, longest, window = flash_mask(case, q.device)
        out, lse, seed, unused, _ = aten._flash_attention_forward(
            q, k, v, cum, cum, longest, longest, 0.0, True, False, **window
        )
        shaped = out if case.documents is None else out[None]
        return shaped.transpose(1, 2), lse, seed, unused

    def masked_backward(self, x: Inputs, saved: Saved, case: Case) -> tuple[Tensor, ...]:
        out, lse, seed, unused = saved
        q, k, v, dout, out = (flash_layout(each, case) for each in (*x, out))
        cum, longest, window = flash_mask(case, q.device)
        grads = aten._flash_attention_backward(
            dout, q, k, v, out, lse, cum, cum, longest, longest, 0.0, True, seed, unused, **window
        )
        return tuple((grad if case.documents is None else grad[None]).transpose(1, 2) for grad in grads)


def flash_layout(x: Tensor, case: Case) -> Tensor:
    """[B, L, H, D] from views with heads first, or [L, H, D] where documents are packed."""
    x = x.transpose(1, 2)
    return x if case.documents is None else x[0]


@lru_cache(maxsize=8)
def flash_mask(case: Case, device: torch.device) -> tuple[Tensor | None, int, dict[str, int]]:
    """A causal mask with a window or documents in flash-attn's words: cu_seqlens, the longest document, the window."""
    window = {} if case.window is None else {"window_size_left": case.window - 1, "window_size_right": 0}
    if case.documents is None:
        return None, case.seq_len, window
    longest = max(end - start for start, end in pairwise(case.documents))
    return torch.tensor(case.documents, dtype=torch.int32, device=device), longest, window


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


BY_TORCH = {"aten": TorchFlash(), "cudnn": TorchCudnn()}  # by the names of our kernels that call the same
