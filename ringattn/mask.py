"""Masks: which keys a query may see, by global position. A new mask is one function that emits segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringattn.kernels.segments import Segment, Segments
from ringattn.layout import Run

__all__ = ["Mask"]


@dataclass(frozen=True)
class Mask:
    """No mask, or `causal`: a query sees the keys at its own position and before."""

    causal: bool = False

    def __str__(self) -> str:
        return "causal" if self.causal else "none"

    def offset(self, queries: Run, keys: Run) -> int:
        """The offset at which row i of a run sees key j of another: j <= i + offset.

        With equal steps, keys.start + j step <= queries.start + i step gives j <= i + floor((q - k) / step).

        Example:
            >>> Mask(causal=True).offset(Run(8, 4), Run(6, 4)), Mask(causal=True).offset(Run(0, 4, 2), Run(1, 4, 2))
            (2, -1)
        """
        if not self.causal:
            return keys.length
        if queries.step != keys.step:
            raise AssertionError(f"runs of one layout have one step, got {queries} and {keys}")
        return (queries.start - keys.start) // queries.step

    def segments(self, queries: Sequence[Run], keys: Sequence[Run]) -> Segments:
        """What the rows of one shard see of another shard, in canonical form, nothing invisible listed."""
        found = []
        q_start = 0
        for query in queries:
            k_start = 0
            for key in keys:
                segment = Segment(q_start, query.length, k_start, key.length, self.offset(query, key)).canonical()
                if segment is not None:
                    found.append(segment)
                k_start += key.length
            q_start += query.length
        return Segments(found)
