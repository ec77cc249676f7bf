"""A decoder-only transformer that does not know whether its sequence is whole or cut.

Only two things in it depend on where a token lives: attention, which asks the `ContextParallel` it is given,
and RoPE, which turns by positions in the whole sequence, or in a document of it. Everything else works token by token.

    B batch    L tokens of this rank    C model dim    F hidden dim    V vocabulary
    H query heads    G key/value heads    D head dim (C = H * D)

    x_BLC = embed(ids_BL)
    x_BLC += out(attention(rope(q), rope(k), v)),  q, k, v = project(norm(x_BLC))
    x_BLC += down(silu(gate(h)) * up(h)),  h = norm(x_BLC)                           (SwiGLU, arXiv:2002.05202)
    logits_BLV = head(norm(x_BLC))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

import ringattn

from . import settings
from .data import VOCABULARY

__all__ = ["Transformer", "rope", "rope_turns"]


Turns = tuple[Tensor, Tensor]  # cosine and sine, [L, D/2] each
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> out


def rope_turns(positions_L: Tensor, head_dim: int, base: float) -> Turns:
    """Turns by the angles position * base^(-2i / D), in fp32 (arXiv:2104.09864)."""
    # In fp64: beyond 2^24 positions times frequencies would already be wrong in fp32.
    exponents = torch.arange(0, head_dim, 2, device=positions_L.device, dtype=torch.float64) / head_dim
    angles = positions_L.double()[:, None] * base**-exponents
    return angles.cos().float(), angles.sin().float()


def rope(x_BLHD: Tensor, turns: Turns) -> Tensor:
    """Turn the pairs (i, i + D/2) of every head by the token's angles; computed in fp32, dtype kept."""
    cos_L1D, sin_L1D = (part[:, None] for part in turns)
    left, right = x_BLHD.float().chunk(2, -1)
    turned = torch.cat((left * cos_L1D - right * sin_L1D, right * cos_L1D + left * sin_L1D), -1)
    return turned.to(x_BLHD.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention over the whole sequence, of which this rank holds a part."""

    def __init__(self, shape: settings.Model) -> None:
        super().__init__()
        self.heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        self.head_dim = shape.head_dim
        self.project = nn.Linear(shape.dim, sum(self.heads) * shape.head_dim, bias=False)
        self.out = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(self, x_BLC: Tensor, turns: Turns, attend: Attend) -> Tensor:
        heads_BLND = self.project(x_BLC).unflatten(-1, (-1, self.head_dim))
        q_BLHD, k_BLGD, v_BLGD = heads_BLND.split(self.heads, -2)
        out_BLHD = attend(rope(q_BLHD, turns), rope(k_BLGD, turns), v_BLGD)
        return self.out(out_BLHD.flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, shape: settings.Model) -> None:
        super().__init__()
        self.gate_up = nn.Linear(shape.dim, 2 * shape.hidden, bias=False)
        self.out = nn.Linear(shape.hidden, shape.dim, bias=False)

    def forward(self, x_BLC: Tensor) -> Tensor:
        gate_BLF, up_BLF = self.gate_up(x_BLC).chunk(2, -1)
        return self.out(functional.silu(gate_BLF) * up_BLF)


class Block(nn.Module):
    def __init__(self, shape: settings.Model) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.dim, eps=1e-6)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.dim, eps=1e-6)
        self.mlp = SwiGLU(shape)

    def forward(self, x_BLC: Tensor, turns: Turns, attend: Attend) -> Tensor:
        x_BLC = x_BLC + self.attention(self.attention_norm(x_BLC), turns, attend)
        return x_BLC + self.mlp(self.mlp_norm(x_BLC))


class Transformer(nn.Module):
    """The model. Weights come from `seed` alone, on the CPU: the same on every rank and device.

    Args:
        shape: sizes.
        seed: of the initial weights.
    """

    def __init__(self, shape: settings.Model, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(VOCABULARY, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, eps=1e-6)
        self.head = nn.Linear(shape.dim, VOCABULARY, bias=False)
        self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal of deviation 0.02; what is added to the residual stream, by 2 * layers summands, smaller."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # norms begin at one
            summand = name.endswith("out.weight")
            parameter.normal_(0, 0.02 / math.sqrt(2 * self.shape.layers) if summand else 0.02, generator=generator)

    def forward(
        self, ids_BL: Tensor, cp: ringattn.ContextParallel, seq_len: int, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Logits of this rank's tokens.

        Args:
            ids_BL (Tensor): [B, L] int64, this rank's part of the sequence, as `cp.shard` cuts it.
            cp: how the sequence is cut.
            seq_len: length of the whole sequence.
            cu_seqlens: where the documents of a packed sequence begin; each is as if it were alone.

        Returns:
            [B, L, V].
        """
        positions_L = cp.positions(seq_len, ids_BL.device, cu_seqlens=cu_seqlens)
        turns = rope_turns(positions_L, self.shape.head_dim, self.shape.rope_base)
        attend = partial(cp.attention, causal=True, seq_len=seq_len, cu_seqlens=cu_seqlens)
        x_BLC = self.embed(ids_BL)
        for block in self.blocks:
            x_BLC = block(x_BLC, turns, attend)
        return self.head(self.norm(x_BLC))
