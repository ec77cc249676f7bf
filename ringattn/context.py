"""ContextParallel: the object that users hold. A group of ranks, a layout, and everything that follows from them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.attention import choose, ring_attention
from ringattn.kernels.registry import choose_kernel
from ringattn.layout import Layout, make_layout
from ringattn.plan import Plan, make_plan
from ringattn.ranks import group_name, ranks_named

__all__ = ["ContextParallel"]


class ContextParallel:
    """Ranks that share sequences, each holding the part that the layout gives it.

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, or None for all ranks (this process alone where torch.distributed
            is not initialised).
        layout: "zigzag" balances causal work; "contiguous" and "striped" are the others.
        kernel, executor: see `ring_attention`.

    Raises:
        ValueError: an unknown layout, or a mesh of several dimensions.

    Example:
        >>> cp = ContextParallel()  # one process: everything is here
        >>> cp.shard(torch.arange(6).view(1, 6)).tolist(), cp.positions(6).tolist()
        ([[0, 1, 2, 3, 4, 5]], [0, 1, 2, 3, 4, 5])
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        layout: str = "zigzag",
        kernel: str = "auto",
        executor: str = "auto",
    ):
        make_layout(layout, 0, 1)  # an unknown name raises here, not at the first call
        self.layout = layout
        self.kernel = kernel
        self.executor = executor
        self._ranks = ranks_named(group_name(group))
        self.group = self._ranks.group
        self.rank = self._ranks.rank
        self.size = self._ranks.size

    def _layout(self, seq_len: int) -> Layout:
        return make_layout(self.layout, seq_len, self.size)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor that every rank holds whole: tokens, labels, embeddings, any dim.

        Args:
            x (Tensor): any shape and dtype; dimension `dim` is the whole sequence.
        """
        return self._layout(x.shape[dim]).shard(x, self.rank, dim)

    def unshard(self, x: Tensor, dim: int = 1, *, seq_len: int | None = None) -> Tensor:
        """The whole sequence, on every rank, from every rank's part: the inverse of `shard`. Collective.

        Differentiable; the gradient of a part is the sum of what all ranks make of the whole.

        Args:
            x (Tensor): this rank's part in dimension `dim`.
            seq_len: tokens of the whole sequence; x.shape[dim] * size unless given.

        Raises:
            ValueError: x is not as long as this rank's part.
        """
        layout = self._layout(x.shape[dim] * self.size if seq_len is None else seq_len)
        if x.shape[dim] != layout.lengths[self.rank]:
            raise ValueError(
                f"got {x.shape[dim]} tokens in dim {dim} of {tuple(x.shape)}, but rank {self.rank} holds "
                f"{layout.lengths[self.rank]} of {layout.seq_len}; pass the seq_len that was sharded"
            )
        if self.group is None:
            return layout.unshard([x], dim)
        return _Unshard.apply(x, dim, layout, self.group)

    def positions(self, seq_len: int, device: torch.device | str | None = None) -> Tensor:
        """Global positions of this rank's tokens, for rotary or learnt positions: int64 [L]."""
        return self._layout(seq_len).positions(self.rank).to(device or "cpu")

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """`ring_attention` with this object's group, layout, kernel and executor.

        Args:
            q, k, v (Tensor): this rank's [B, L, H, D], [B, L, G, D], [B, L, G, E].
            options: causal, softmax_scale, seq_len, return_lse.
        """
        return ring_attention(
            q, k, v, group=self.group, layout=self.layout, kernel=self.kernel, executor=self.executor, **options
        )

    def plan(self, seq_len: int, *, causal: bool = False) -> Plan:
        """What each rank computes and sends for a sequence of `seq_len` tokens; it prints itself readably."""
        return make_plan(self.layout, seq_len, self.size, causal=causal)

    def explain(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> str:
        """What attention on such tensors would run, and why, with the times that were predicted. What ranks have in
        common is known after the first call of `attention`; before it, executors that need one node are left out."""
        choice = choose_kernel(self.kernel, q, k, v)
        plan = self.plan(q.shape[1] * self.size, causal=causal)
        executor = choose(self._ranks, plan, q, k, v, self.kernel, self.executor)
        return "\n".join(
            (
                f"kernel: {choice.kernel.name} ({choice.reason})",
                f"executor: {executor}",
                f"layout: {self.layout}",
            )
        )


class _Unshard(torch.autograd.Function):
    """All parts, padded to the longest, gathered and put in order."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, layout: Layout, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.layout, ctx.group = dim, layout, group
        x = x.movedim(dim, 0)
        padded = x.new_zeros(max(layout.lengths), *x.shape[1:])
        padded[: x.shape[0]] = x
        gathered = [torch.empty_like(padded) for _ in layout.lengths]
        dist.all_gather(gathered, padded, group=group)
        parts = [part[:length] for part, length in zip(gathered, layout.lengths, strict=True)]
        return layout.unshard(parts, 0).movedim(0, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return ctx.layout.shard(total, dist.get_rank(ctx.group), ctx.dim), None, None, None
