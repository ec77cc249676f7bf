"""ContextParallel: the object that users hold. A group of ranks, a layout, and everything that follows from them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.attention import ring_attention
from ringattn.documents import CuSeqlens, documents_of
from ringattn.kernels.registry import choose_kernel
from ringattn.layout import Layout, make_layout
from ringattn.mask import Mask, WindowSize, make_mask
from ringattn.plan import Plan, plan_of
from ringattn.preparation import choose
from ringattn.ranks import group_name, ranks_named

__all__ = ["ContextParallel"]


class ContextParallel:
    """Ranks that share sequences, each holding the part that the layout gives it.

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, or None for all ranks (this process alone where torch.distributed
            is not initialised).
        layout: "zigzag" balances dense causal work, "balanced" any: packed documents, windows; "contiguous" and
            "striped" are the others. "balanced" depends on the documents: give it the same cu_seqlens everywhere.
        kernel, executor, deterministic: see `ring_attention`.
        balance: what "balanced" balances, besides documents: `Mask(causal=True, window=(4095, 0))` where all layers
            have that window. Causal unless given. The layers of a model share one layout whatever their masks are.

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
        deterministic: bool | None = None,
        balance: Mask | None = None,
    ):
        make_layout(layout, 0, 1)  # an unknown name raises here, not at the first call
        if balance is not None and balance.documents is not None:
            raise ValueError(f"got balance={balance}; documents change from batch to batch: pass cu_seqlens with each")
        self.layout = layout
        self.balance = balance or Mask(causal=True)
        self.kernel = kernel
        self.executor = executor
        self.deterministic = deterministic
        self._ranks = ranks_named(group_name(group))
        self.group = self._ranks.group
        self.rank = self._ranks.rank
        self.size = self._ranks.size

    def _layout(self, seq_len: int, cu_seqlens: CuSeqlens | None) -> Layout:
        documents = None if cu_seqlens is None else documents_of(cu_seqlens)
        return make_layout(self.layout, seq_len, self.size, self.balance.within(documents))

    def shard(self, x: Tensor, dim: int = 1, *, cu_seqlens: CuSeqlens | None = None) -> Tensor:
        """This rank's part of a tensor that every rank holds whole: tokens, labels, loss weights, embeddings, any dim.

        Args:
            x (Tensor): any shape and dtype; dimension `dim` is the whole sequence.
            cu_seqlens: the documents of the sequence, as in `ring_attention`; "balanced" depends on them.
        """
        return self._layout(x.shape[dim], cu_seqlens).shard(x, self.rank, dim)

    def unshard(
        self, x: Tensor, dim: int = 1, *, seq_len: int | None = None, cu_seqlens: CuSeqlens | None = None
    ) -> Tensor:
        """The whole sequence, on every rank, from every rank's part: the inverse of `shard`. Collective.

        Differentiable; the gradient of a part is the sum of what all ranks make of the whole.

        Args:
            x (Tensor): this rank's part in dimension `dim`.
            seq_len: tokens of the whole sequence; x.shape[dim] * size unless given.
            cu_seqlens: what `shard` was given.

        Raises:
            ValueError: x is not as long as this rank's part.
        """
        layout = self._layout(x.shape[dim] * self.size if seq_len is None else seq_len, cu_seqlens)
        if x.shape[dim] != layout.lengths[self.rank]:
            raise ValueError(
                f"got {x.shape[dim]} tokens in dim {dim} of {tuple(x.shape)}, but rank {self.rank} holds "
                f"{layout.lengths[self.rank]} of {layout.seq_len}; pass the seq_len that was sharded"
            )
        if self.group is None:
            return layout.unshard([x], dim)
        return _Unshard.apply(x, dim, layout, self.group)

    def positions(
        self, seq_len: int, device: torch.device | str | None = None, *, cu_seqlens: CuSeqlens | None = None
    ) -> Tensor:
        """Positions of this rank's tokens, for rotary or learnt positions: int64 [L].

        In the whole sequence, or, with cu_seqlens, in each token's document.

        Example:
            >>> ContextParallel().positions(6, cu_seqlens=[0, 4, 6]).tolist()
            [0, 1, 2, 3, 0, 1]
        """
        positions = self._layout(seq_len, cu_seqlens).positions(self.rank)
        if cu_seqlens is not None:
            positions = documents_of(cu_seqlens).positions(positions)
        return positions.to(device or "cpu")

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """`ring_attention` with this object's group, layout, kernel, executor and determinism.

        Args:
            q, k, v (Tensor): this rank's [B, L, H, D], [B, L, G, D], [B, L, G, E].
            options: causal, window_size, cu_seqlens, sinks, softcap, softmax_scale, seq_len, return_lse.
        """
        how: dict[str, Any] = {"layout": self.layout, "kernel": self.kernel, "executor": self.executor}
        how |= {"deterministic": self.deterministic, "balance": self.balance}
        return ring_attention(q, k, v, group=self.group, **how, **options)

    def plan(
        self,
        seq_len: int,
        *,
        causal: bool = False,
        window_size: WindowSize = None,
        cu_seqlens: CuSeqlens | None = None,
    ) -> Plan:
        """What each rank computes and sends for a sequence of `seq_len` tokens; it prints itself readably.

        Plans are kept: asked for in a data loader's thread, the plan of the next batch is there when it is needed.
        """
        return plan_of(self.layout, seq_len, self.size, make_mask(causal, window_size, cu_seqlens), self.balance)

    def explain(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> str:
        """What attention on such tensors would run, and why, with the times that were predicted. What ranks have in
        common is known after the first call of `attention`; before it, executors that need one node are left out."""
        choice = choose_kernel(self.kernel, q, k, v, deterministic=self.deterministic)
        plan = self.plan(q.shape[1] * self.size, causal=causal)
        executor = choose(self._ranks, plan, q, k, v, choice.kernel, self.executor)
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
