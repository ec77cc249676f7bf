"""The plan: layout x mask -> segments, and from the same list work, traffic and balance.

Legend: S tokens in all, P ranks, r a rank, s the source of a shard of keys and values, t the step of the ring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np

from ringattn.documents import CuSeqlens
from ringattn.kernels.segments import Segments, count_pairs
from ringattn.layout import Layout, make_layout
from ringattn.mask import Mask, WindowSize, make_mask
from ringattn.pieces import visible_segments

__all__ = ["Plan", "make_plan"]

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Who computes what, and which keys and values travel where. Needs no GPU and no process group."""

    layout: Layout
    mask: Mask

    @property
    def ranks(self) -> int:
        return self.layout.ranks

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """All segments, ordered by rank and source, and where each (rank, source) begins: [N, 6], [P P + 1]."""
        rank, source, table = visible_segments(self.layout, self.mask)
        count = np.bincount(rank * self.ranks + source, minlength=self.ranks**2)
        return table, np.concatenate(([0], np.cumsum(count)))

    @cached_property
    def work(self) -> np.ndarray:
        """Visible pairs of each (rank, source): int64 [P, P]."""
        table, begin = self._table
        total = np.concatenate(([0], np.cumsum(count_pairs(table))))
        return np.diff(total[begin]).reshape(self.ranks, self.ranks)

    def segments(self, rank: int, source: int) -> Segments:
        """What the queries of `rank` see of the keys of `source`, in positions within the two shards. The same
        object whenever asked.

        Example:
            >>> # rank 0 holds tokens 0 1 6 7, rank 1 holds 2 3 4 5: the first two see none of these, the others all
            >>> [segment[:5] for segment in make_plan("zigzag", 8, 2, causal=True).segments(rank=0, source=1)]
            [(2, 2, 0, 2, 1), (2, 2, 2, 2, 1)]
        """

        def build() -> Segments:
            table, begin = self._table
            which = rank * self.ranks + source
            return Segments(table[begin[which] : begin[which + 1]])

        return self.derive(("segments", rank, source), build)

    def gathered_segments(self, rank: int) -> Segments:
        """What the queries of `rank` see of all keys, the shards laid end to end in rank order.

        Example:
            >>> [segment[2:4] for segment in make_plan("contiguous", 8, 2, causal=True).gathered_segments(rank=1)]
            [(0, 4), (4, 4)]
        """

        def build() -> Segments:
            parts, shift = [], 0
            for source, length in enumerate(self.layout.lengths):
                parts.append(self.segments(rank, source).table + np.array([0, 0, shift, 0, 0, 0]))
                shift += length
            return Segments(np.concatenate(parts))

        return self.derive(("gathered segments", rank), build)

    def derive(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` makes of this plan, made once per `key`: an executor's own view of it outlives a call."""
        if key not in self._kept:
            self._kept[key] = build()
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[Hashable, Any]:
        return {}

    def pairs(self, rank: int) -> int:
        """Visible (query, key) pairs that a rank computes."""
        return int(self.work[rank].sum())

    def flops(self, rank: int, *, heads: int, head_dim: int, v_head_dim: int | None = None, batch: int = 1) -> int:
        """Floating-point operations of a rank's forward; the backward counts as 2.5 times that.

        Two products, Q K^T and P V, of two operations a pair, head and head dim (arXiv:2307.08691, section 4.1).
        """
        return 2 * (head_dim + (v_head_dim or head_dim)) * heads * batch * self.pairs(rank)

    @property
    def balance(self) -> float:
        """The mean rank's work over the busiest rank's: 1 is perfect, 1/P means that one rank does it all."""
        pairs = self.work.sum(1)
        return float(pairs.sum() / (self.ranks * pairs.max())) if pairs.any() else 1.0

    def reach(self, source: int) -> int:
        """How many hops a shard of keys and values must travel round the ring until all who need it have seen it.

        Example:
            >>> plan = make_plan("contiguous", 8, 4, causal=True)
            >>> [plan.reach(source) for source in range(4)]  # the last shard is seen by nobody but its owner
            [3, 2, 1, 0]
            >>> plan = make_plan("contiguous", 8, 4, causal=True, window_size=3)
            >>> [plan.reach(source) for source in range(4)]
            [1, 1, 1, 0]
        """
        return self._reaches[source]

    @cached_property
    def _reaches(self) -> tuple[int, ...]:
        ranks = np.arange(self.ranks)
        hops = (ranks[:, None] - ranks[None, :]) % self.ranks
        return tuple((hops * (self.work > 0)).max(0).tolist())

    @cached_property
    def keys_needed(self) -> np.ndarray:
        """How many keys of each source the queries of each rank look at: int64 [P, P], own ones on the diagonal.

        Example:
            >>> make_plan("contiguous", 8, 2, causal=True, window_size=3).keys_needed.tolist()
            [[4, 0], [2, 4]]
        """
        table, begin = self._table
        which = np.repeat(np.arange(self.ranks**2), np.diff(begin))
        shift = which * (self.layout.seq_len + 1)  # so that intervals of different (rank, source) do not meet
        start = table[:, 2] + shift
        order = np.argsort(start, kind="stable")
        start, end = start[order], (start + table[:, 3])[order]
        seen = np.concatenate(([0], np.maximum.accumulate(end)[:-1])) if len(end) else end
        fresh = np.maximum(end - np.maximum(start, seen), 0)
        return np.bincount(which, fresh, self.ranks**2).astype(np.int64).reshape(self.ranks, self.ranks)

    @cached_property
    def _spans(self) -> np.ndarray:
        """From which to which key each (rank, source) looks; an empty span is (length, 0): int64 [2, P, P]."""
        table, begin = self._table
        low = np.broadcast_to(np.array(self.layout.lengths), (self.ranks, self.ranks)).copy()
        high = np.zeros_like(low)
        which = np.repeat(np.arange(self.ranks**2), np.diff(begin))
        np.minimum.at(low.reshape(-1), which, table[:, 2])
        np.maximum.at(high.reshape(-1), which, table[:, 2] + table[:, 3])
        return np.stack((low, high))

    def span(self, rank: int, source: int) -> tuple[int, int]:
        """The first key of `source` that a query of `rank` looks at, and the one after the last; (0, 0) for none."""
        low, high = self._spans[:, rank, source].tolist()
        return (low, high) if high else (0, 0)

    def cargo(self, source: int, hop: int) -> slice:
        """The keys of a shard that ranks `hop` or more hops away look at, from the first to the last of them.

        Example:
            >>> plan = make_plan("contiguous", 12, 3, causal=True, window_size=3)
            >>> plan.cargo(source=0, hop=1)  # tokens 4 and 5 look at tokens 2 and 3
            slice(2, 4, None)
        """

        def build() -> slice:
            ranks = (source + np.arange(hop, self.ranks)) % self.ranks
            low, high = self._spans[0, ranks, source], self._spans[1, ranks, source]
            return slice(int(low.min()), int(high.max())) if high.any() else slice(0, 0)

        return self.derive(("cargo", source, hop), build)

    def tokens_sent(self, rank: int) -> int:
        """Tokens of keys and values that a rank passes on in the forward, its own and others'."""
        cargo = (self.cargo((rank - step) % self.ranks, step + 1) for step in range(self.ranks - 1))
        return sum(keys.stop - keys.start for keys in cargo)

    def bytes_sent(
        self, rank: int, *, kv_heads: int, head_dim: int, v_head_dim: int | None = None, itemsize: int, batch: int = 1
    ) -> int:
        """Bytes that a rank passes on in the forward. The backward sends these and, in fp32, as many gradients."""
        return self.tokens_sent(rank) * batch * kv_heads * (head_dim + (v_head_dim or head_dim)) * itemsize

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that the plan depends on, equal on ranks that hold equal plans."""
        return hashlib.sha256(repr((self.layout, self.mask)).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        layout = self.layout
        total = max(int(self.work.sum()), 1)
        lines = [
            f"plan {self.fingerprint}: {layout.seq_len} tokens on {self.ranks} ranks, layout {layout.name}, "
            f"mask {self.mask}, balance {self.balance:.3f}",
            f"{'rank':>4}  {'tokens':>8}  {'work':>6}  {'sends (tokens)':>14}  holds",
        ]
        for rank in range(self.ranks):
            runs = [
                f"{run.start}..{run.start + (run.length - 1) * run.step}" + (f" by {run.step}" if run.step > 1 else "")
                for run in layout.runs[rank]
                if run.length
            ]
            holds = " ".join(runs[:4]) + (f" and {len(runs) - 4} more runs" if len(runs) > 4 else "")
            lines.append(
                f"{rank:>4}  {layout.lengths[rank]:>8}  {self.pairs(rank) / total:>6.1%}  "
                f"{self.tokens_sent(rank):>14}  {holds or 'nothing'}"
            )
        return "\n".join(lines)


def make_plan(
    layout: str,
    seq_len: int,
    ranks: int,
    *,
    causal: bool = False,
    window_size: WindowSize = None,
    cu_seqlens: CuSeqlens | None = None,
    balance: Mask | None = None,
) -> Plan:
    """The plan for a layout by name and a mask; equal arguments give the very same object.

    Args:
        causal, window_size, cu_seqlens: the mask, see `make_mask`.
        balance: the causality and window whose work the layout "balanced" balances, in the documents of cu_seqlens;
            causal unless given. Not the mask itself, because layers of different masks share one layout.

    Raises:
        ValueError: no layout has that name, there are less than 0 tokens or less than 1 rank, or the mask does not fit.
    """
    return plan_of(layout, seq_len, ranks, make_mask(causal, window_size, cu_seqlens), balance)


def plan_of(layout: str, seq_len: int, ranks: int, mask: Mask, balance: Mask | None = None) -> Plan:
    """`make_plan` for a mask that is made already."""
    mask.check_length(seq_len)
    balance = (balance or Mask(causal=True)).within(mask.documents)
    cache = _plan if mask.documents is None else _plan_of_documents
    return cache(make_layout(layout, seq_len, ranks, balance), mask)


_plan = lru_cache(maxsize=256)(Plan)
_plan_of_documents = lru_cache(maxsize=16)(Plan)  # larger, and rarely met again after their step
