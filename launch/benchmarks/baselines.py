"""What a few lines of torch do for attention across ranks: exchange heads for tokens, or gather all keys.

ulysses     all-to-all: a share of the tokens, all heads -> all tokens, a share of the heads; attend; all-to-all
            (DeepSpeed Ulysses, arXiv:2309.14509)
allgather   all-gather of keys and values, then local queries with all of them; a reduce-scatter brings the
            gradients of keys and values home
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ringattn.kernels.interface import row_delta
from ringattn.kernels.registry import KERNELS
from ringattn.plan import make_plan

from ..oracle import Case, Inputs
from .across import Across, Local
from .peers import backends

__all__ = ["AllGather", "Ulysses"]


class Exchange(torch.autograd.Function):
    """All-to-all over the first dimension; its own adjoint."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Exchange.forward(ctx, grad.contiguous())


def to_heads(x_BLHD: Tensor, ranks: int) -> Tensor:
    """All tokens of this rank's share of the heads, [B, S, H/P, D], from all heads of its tokens."""
    by_peer = x_BLHD.unflatten(2, (ranks, -1)).movedim(2, 0).contiguous()
    return Exchange.apply(by_peer).movedim(0, 1).flatten(1, 2)  # pyright: ignore[reportOptionalMemberAccess]


def to_tokens(x_BSHD: Tensor, ranks: int) -> Tensor:
    """The inverse of `to_heads`."""
    by_peer = x_BSHD.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()
    return Exchange.apply(by_peer).movedim(0, 2).flatten(2, 3)  # pyright: ignore[reportOptionalMemberAccess]


class Ulysses(Across):
    """Heads for tokens, and back, around torch's attention."""

    name = "ulysses"
    layout = "contiguous"

    def __init__(self, kernel: str):
        self.kernel = kernel

    @property
    def local(self) -> Local:
        return Local(self.kernel, None)

    def refuses(self, x: Inputs, case: Case, ranks: int) -> str | None:
        if case.kv_heads % ranks:
            return f"{case.kv_heads} key/value heads do not divide among {ranks} ranks"
        return super().refuses(x, case, ranks)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
        ranks = dist.get_world_size()
        q, k, v = (to_heads(x, ranks).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backends(self.kernel, q)):
            out = scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=True)
        return to_tokens(out.transpose(1, 2), ranks)


class GatheredAttention(torch.autograd.Function):
    """Local queries, the keys and values of all ranks."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, kernel: str, case: Case, layout: str) -> Tensor:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = torch.stack((k, v))
        gathered = mine.new_empty(ranks * 2, *k.shape)
        dist.all_gather_into_tensor(gathered, mine)
        k, v = gathered.unflatten(0, (ranks, 2)).movedim(0, 2).flatten(2, 3)  # [B, S, G, D], rank by rank
        segments = make_plan(layout, case.seq_len, ranks, **case.mask).gathered_segments(rank)
        how = {"scale": case.head_dim**-0.5}
        out, lse = KERNELS[kernel].forward(q, k, v, segments, **how, out_dtype=q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.segments, ctx.how, ctx.ranks = KERNELS[kernel], segments, how, ranks
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        dq, *dkv = ctx.kernel.backward(dout, q, k, v, out, lse, row_delta(dout, out), ctx.segments, **ctx.how)
        by_owner = torch.stack(dkv).to(q.dtype).unflatten(2, (ctx.ranks, -1)).movedim(2, 0).flatten(0, 1)
        mine = torch.empty_like(by_owner[:2])
        dist.reduce_scatter_tensor(mine, by_owner)
        return dq.to(q.dtype), *mine, None, None, None


class AllGather(Across):
    """All keys everywhere, over torch's attention."""

    name = "allgather"
    any_mask = True

    def __init__(self, kernel: str, causal: bool):
        self.kernel = kernel
        self.layout = "zigzag" if causal else "contiguous"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
        out = GatheredAttention.apply(q, k, v, self.kernel, case, self.layout)
        assert isinstance(out, Tensor)
        return out
