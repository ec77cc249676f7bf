"""Layouts: which rank holds which token of a sequence.

A rank's shard is a short list of runs, laid end to end; a run is `length` tokens from `start`, `step` apart.
For 8 tokens on 2 ranks:

    contiguous   rank 0: 0 1 2 3    rank 1: 4 5 6 7     runs are chunks
    zigzag       rank 0: 0 1 6 7    rank 1: 2 3 4 5     the r-th chunk from each end: causal work is balanced
    striped      rank 0: 0 2 4 6    rank 1: 1 3 5 7     every P-th token (arXiv:2311.09431): balanced as well
    balanced     chunks as the mask wants them          every mask is balanced: see balance.py

Lengths need not divide: as in `torch.tensor_split`, the first `length % chunks` chunks get one token more.
A new layout is one function from (seq_len, ranks, mask) to runs, and its name in `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringattn.balance import balanced_chunks
from ringattn.mask import Mask

__all__ = ["LAYOUTS", "Layout", "Run", "make_layout"]


class Run(NamedTuple):
    """Tokens start, start + step, ..., `length` of them."""

    start: int
    length: int
    step: int = 1


Runs = tuple[tuple[Run, ...], ...]


def chunks(seq_len: int, count: int) -> list[Run]:
    """A sequence cut into `count` chunks whose lengths differ by one token at most.

    Example:
        >>> [chunk.length for chunk in chunks(10, 4)]
        [3, 3, 2, 2]
    """
    base, longer = divmod(seq_len, count)
    return [Run(i * base + min(i, longer), base + (i < longer)) for i in range(count)]


def contiguous(seq_len: int, ranks: int, mask: Mask | None = None) -> Runs:
    """Rank r holds the r-th of P chunks."""
    return tuple((chunk,) for chunk in chunks(seq_len, ranks))


def zigzag(seq_len: int, ranks: int, mask: Mask | None = None) -> Runs:
    """Rank r holds chunks r and 2P-1-r of 2P."""
    pieces = chunks(seq_len, 2 * ranks)
    return tuple((pieces[rank], pieces[2 * ranks - 1 - rank]) for rank in range(ranks))


def striped(seq_len: int, ranks: int, mask: Mask | None = None) -> Runs:
    """Rank r holds tokens r, r + P, r + 2P, ..."""
    return tuple((Run(rank, len(range(rank, seq_len, ranks)), ranks),) for rank in range(ranks))


def balanced(seq_len: int, ranks: int, mask: Mask | None = None) -> Runs:
    """Rank r holds the chunks that balance the work of a mask, causal unless told; neighbours are one run.

    Example:
        >>> balanced(1024, 2)  # of a dense causal mask: zigzag
        ((Run(start=0, length=256, step=1), Run(start=768, length=256, step=1)), (Run(start=256, length=512, step=1),))
    """
    starts, owner = balanced_chunks(seq_len, ranks, mask or Mask(causal=True))
    changes = np.append(True, owner[1:] != owner[:-1])
    begins, holders = starts[:-1][changes], owner[changes]
    lengths = np.diff(begins, append=seq_len)
    runs: list[list[Run]] = [[] for _ in range(ranks)]
    for start, length, rank in zip(begins.tolist(), lengths.tolist(), holders.tolist(), strict=True):
        runs[rank].append(Run(start, length))
    return tuple(map(tuple, runs))


LAYOUTS = {function.__name__: function for function in (contiguous, zigzag, striped, balanced)}


@dataclass(frozen=True, eq=False)  # many runs: hashed by identity, and `make_layout` makes equal ones once
class Layout:
    """Where each token of a sequence of `seq_len` lives among `ranks` ranks."""

    name: str
    seq_len: int
    ranks: int
    runs: Runs

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens on each rank.

        Example:
            >>> make_layout("zigzag", 10, 2).lengths  # chunks of 3, 3, 2, 2
            (5, 5)
        """
        return tuple(sum(run.length for run in runs) for runs in self.runs)

    def positions(self, rank: int) -> Tensor:
        """Global positions of a rank's tokens, in the order of its shard: int64 [lengths[rank]].

        Example:
            >>> make_layout("zigzag", 8, 2).positions(0).tolist()
            [0, 1, 6, 7]
        """
        return torch.cat(
            [torch.arange(run.length, dtype=torch.int64) * run.step + run.start for run in self.runs[rank]]
        )

    @cached_property
    def order(self) -> Tensor:
        """Where each token of the sequence stands when all shards lie end to end: int64 [seq_len].

        Example:
            >>> make_layout("zigzag", 8, 2).order.tolist()
            [0, 1, 4, 5, 6, 7, 2, 3]
        """
        order = torch.empty(self.seq_len, dtype=torch.int64)
        order[torch.cat([self.positions(rank) for rank in range(self.ranks)])] = torch.arange(self.seq_len)
        return order

    def shard(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """A rank's part of `x`, whose dimension `dim` is the whole sequence. A copy, differentiable.

        Raises:
            ValueError: that dimension is not seq_len long.
        """
        if x.shape[dim] != self.seq_len:
            raise ValueError(
                f"got {x.shape[dim]} tokens in dim {dim} of {tuple(x.shape)}, the layout has {self.seq_len}"
            )
        return x.index_select(dim, self.positions(rank).to(x.device))

    def unshard(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The whole sequence from every rank's part, in rank order: the inverse of `shard`.

        Raises:
            ValueError: the parts are not as many or not as long as the layout's.
        """
        got = tuple(part.shape[dim] for part in parts)
        if got != self.lengths:
            raise ValueError(
                f"got parts of {got} tokens in dim {dim}; layout {self.name!r} of {self.seq_len} tokens on "
                f"{self.ranks} ranks has {self.lengths}: pass the seq_len that was sharded"
            )
        return torch.cat(list(parts), dim).index_select(dim, self.order.to(parts[0].device))


def make_layout(name: str, seq_len: int, ranks: int, mask: Mask | None = None) -> Layout:
    """The layout called `name`; equal arguments give the very same object.

    Args:
        mask: what "balanced" balances the work of, causal unless told; the others do not depend on it.

    Raises:
        ValueError: no layout has that name, there are less than 0 tokens or less than 1 rank, or documents hold more
            tokens than the sequence.
    """
    if name not in LAYOUTS:
        raise ValueError(f"got layout={name!r}; choose one of {', '.join(LAYOUTS)}")
    if seq_len < 0 or ranks < 1:
        raise ValueError(f"got seq_len={seq_len} on {ranks} ranks; need seq_len >= 0 and at least one rank")
    if name != "balanced":
        return _layout(name, seq_len, ranks, None)
    mask = mask or Mask(causal=True)
    mask.check_length(seq_len)
    return _layout(name, seq_len, ranks, mask)


@lru_cache(maxsize=256)
def _layout(name: str, seq_len: int, ranks: int, mask: Mask | None) -> Layout:
    return Layout(name, seq_len, ranks, LAYOUTS[name](seq_len, ranks, mask))
