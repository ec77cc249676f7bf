"""The plan: layout x mask -> segments, and from the same list work, traffic and balance.

Legend: S tokens in all, P ranks, r a rank, s the source of a shard of keys and values, t the step of the ring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from ringattn.kernels.segments import Segment, Segments
from ringattn.layout import Layout, make_layout
from ringattn.mask import Mask

__all__ = ["Plan", "make_plan"]

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Who computes what, and which keys and values travel where. Needs no GPU and no process group."""

    layout: Layout
    mask: Mask
    _segments: dict[tuple[int, int], Segments] = field(default_factory=dict, repr=False, compare=False)
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def ranks(self) -> int:
        return self.layout.ranks

    def segments(self, rank: int, source: int) -> Segments:
        """What the queries of `rank` see of the keys of `source`, in positions within the two shards.

        Example:
            >>> # rank 0 holds tokens 0 1 6 7, rank 1 holds 2 3 4 5: the first two see none of these, the others all
            >>> [segment[:5] for segment in make_plan("zigzag", 8, 2, causal=True).segments(rank=0, source=1)]
            [(2, 2, 0, 2, 1), (2, 2, 2, 2, 1)]
        """
        if (rank, source) not in self._segments:
            self._segments[rank, source] = self.mask.segments(self.layout.runs[rank], self.layout.runs[source])
        return self._segments[rank, source]

    def derive(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` makes of this plan, made once per `key`: an executor's own view of it outlives a call."""
        if key not in self._derived:
            self._derived[key] = build()
        return self._derived[key]

    def query_pieces(self, rank: int) -> dict[tuple[int, int], list[tuple[int, Segment]]]:
        """For each piece (q_start, q_len) of a rank's queries: the (source, segment) it looks at."""
        pieces: dict[tuple[int, int], list[tuple[int, Segment]]] = {}
        for source in range(self.ranks):
            for segment in self.segments(rank, source):
                pieces.setdefault((segment.q_start, segment.q_len), []).append((source, segment))
        return pieces

    def key_pieces(self, source: int) -> dict[tuple[int, int], list[tuple[int, Segment]]]:
        """The transpose, for the backward: for each piece (k_start, k_len) of a shard of keys, the (rank, segment)
        that look at it."""
        pieces: dict[tuple[int, int], list[tuple[int, Segment]]] = {}
        for rank in range(self.ranks):
            for segment in self.segments(rank, source):
                pieces.setdefault((segment.k_start, segment.k_len), []).append((rank, segment))
        return pieces

    def pairs(self, rank: int) -> int:
        """Visible (query, key) pairs that a rank computes."""
        return sum(segment.pairs for source in range(self.ranks) for segment in self.segments(rank, source))

    def flops(self, rank: int, *, heads: int, head_dim: int, v_head_dim: int | None = None, batch: int = 1) -> int:
        """Floating-point operations of a rank's forward; the backward counts as 2.5 times that.

        Two products, Q K^T and P V, of two operations a pair, head and head dim (arXiv:2307.08691, section 4.1).
        """
        return 2 * (head_dim + (v_head_dim or head_dim)) * heads * batch * self.pairs(rank)

    @property
    def balance(self) -> float:
        """The mean rank's work over the busiest rank's: 1 is perfect, 1/P means that one rank does it all."""
        pairs = [self.pairs(rank) for rank in range(self.ranks)]
        return sum(pairs) / (self.ranks * max(pairs)) if max(pairs) else 1.0

    def reach(self, source: int) -> int:
        """How many hops a shard of keys and values must travel round the ring until all who need it have seen it.

        Example:
            >>> plan = make_plan("contiguous", 8, 4, causal=True)
            >>> [plan.reach(source) for source in range(4)]  # the last shard is seen by nobody but its owner
            [3, 2, 1, 0]
        """
        hops = (hop for hop in range(self.ranks - 1, 0, -1) if self.segments((source + hop) % self.ranks, source))
        return next(hops, 0)

    def tokens_sent(self, rank: int) -> int:
        """Tokens of keys and values that a rank passes on in the forward, its own and others'."""
        sources = ((rank - step) % self.ranks for step in range(self.ranks))
        return sum(self.layout.lengths[source] for step, source in enumerate(sources) if step < self.reach(source))

    def bytes_sent(
        self, rank: int, *, kv_heads: int, head_dim: int, v_head_dim: int | None = None, itemsize: int, batch: int = 1
    ) -> int:
        """Bytes that a rank passes on in the forward. The backward sends these and, in fp32, as many gradients."""
        return self.tokens_sent(rank) * batch * kv_heads * (head_dim + (v_head_dim or head_dim)) * itemsize

    @property
    def fingerprint(self) -> str:
        """A hash of everything that the plan depends on, equal on ranks that hold equal plans."""
        return hashlib.sha256(repr((self.layout, self.mask)).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        layout = self.layout
        total = max(sum(self.pairs(rank) for rank in range(self.ranks)), 1)
        lines = [
            f"plan {self.fingerprint}: {layout.seq_len} tokens on {self.ranks} ranks, layout {layout.name}, "
            f"mask {self.mask}, balance {self.balance:.3f}",
            f"{'rank':>4}  {'tokens':>8}  {'work':>6}  {'sends (tokens)':>14}  holds",
        ]
        for rank in range(self.ranks):
            runs = " ".join(
                f"{run.start}..{run.start + (run.length - 1) * run.step}" + (f" by {run.step}" if run.step > 1 else "")
                for run in layout.runs[rank]
                if run.length
            )
            lines.append(
                f"{rank:>4}  {layout.lengths[rank]:>8}  {self.pairs(rank) / total:>6.1%}  "
                f"{self.tokens_sent(rank):>14}  {runs or 'nothing'}"
            )
        return "\n".join(lines)


@lru_cache(maxsize=256)
def make_plan(layout: str, seq_len: int, ranks: int, *, causal: bool) -> Plan:
    """The plan for a layout by name and a mask; equal arguments give the very same object.

    Raises:
        ValueError: no layout has that name, or there are less than 0 tokens or less than 1 rank.
    """
    return Plan(make_layout(layout, seq_len, ranks), Mask(causal=causal))
