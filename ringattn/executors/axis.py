"""Keys of several ranks on one axis: the segments of a plan, counted from where an executor puts the keys.

A `Piece` is a stretch of one rank's shard and its place on the axis. Two ways to lay them:

    slots   every shard whole, in a slot as long as the longest: what an all-gather leaves
    spans   only what this rank's queries look at, end to end: nothing is brought that nobody here needs

For zigzag and causal on 2 ranks of 8 tokens each, as rank 1 sees them (rank 0's later half is hidden from it):

    slots   |0 0 0 0 0 0 0 0|1 1 1 1 1 1 1 1|        spans   |1 1 1 1 1 1 1 1|0 0 0 0|
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ringattn.kernels.segments import Segments, canonical_table
from ringattn.plan import Plan

__all__ = ["Axis", "Piece", "slots", "span", "spans", "within"]


class Piece(NamedTuple):
    """Keys start .. stop of the shard of `source`, at `base` on the axis."""

    source: int
    start: int
    stop: int
    base: int

    @property
    def place(self) -> slice:
        """Where it lies on the axis."""
        return slice(self.base, self.base + self.stop - self.start)

    def of(self, start: int, stop: int) -> slice:
        """Where keys start .. stop of the shard lie on the axis."""
        return slice(self.base + start - self.start, self.base + stop - self.start)


class Axis(NamedTuple):
    """Pieces, how long the axis is, and what one rank's queries see of it."""

    pieces: tuple[Piece, ...]
    length: int
    segments: Segments


def span(plan: Plan, rank: int, source: int) -> tuple[int, int]:
    """The first key of `source` that a query of `rank` sees, and the one after the last; (0, 0) if it sees none.

    Example:
        >>> from ringattn.plan import make_plan
        >>> plan = make_plan("zigzag", 8, 2, causal=True)
        >>> span(plan, 0, 1), span(plan, 1, 0)  # rank 0 holds the very last tokens and sees all of rank 1's
        ((0, 4), (0, 2))
    """
    return plan.span(rank, source)


def spans(plan: Plan, rank: int, sources: Sequence[int], *, whole: int | None = None, slot: int | None = None) -> Axis:
    """What `rank` sees of each of `sources`, in that order, end to end or in slots of so many keys; the shard of
    `whole` entire."""

    def build() -> Axis:
        pieces, base = [], 0
        for index, source in enumerate(sources):
            start, stop = (0, plan.layout.lengths[source]) if source == whole else span(plan, rank, source)
            pieces.append(Piece(source, start, stop, base if slot is None else index * slot))
            base += stop - start
        length = base if slot is None else slot * len(sources)
        return Axis(tuple(pieces), length, seen(plan, rank, pieces))

    return plan.derive(("spans", rank, tuple(sources), whole, slot), build)


def slots(plan: Plan, rank: int) -> Axis:
    """All shards in rank order, each in a slot as long as the longest."""

    def build() -> Axis:
        lengths = plan.layout.lengths
        slot = max(lengths)
        pieces = tuple(Piece(source, 0, length, source * slot) for source, length in enumerate(lengths))
        return Axis(pieces, slot * len(lengths), seen(plan, rank, pieces))

    return plan.derive(("slots", rank), build)


def seen(plan: Plan, rank: int, pieces: Iterable[Piece]) -> Segments:
    """What a rank sees of pieces, counted along the axis."""
    tables = [plan.segments(rank, piece.source).table + moved(piece.base - piece.start) for piece in pieces]
    return Segments(np.concatenate(tables) if tables else ())


def moved(keys: int) -> np.ndarray:
    """What is added to a segment whose keys are moved so far."""
    return np.array([0, 0, keys, 0, 0, 0])


def within(segments: Segments, start: int, stop: int) -> Segments:
    """What is seen of keys start .. stop, counted from `start`.

    Example:
        >>> from ringattn.kernels.segments import Segment
        >>> within(Segments([Segment(0, 4, 0, 4, 0)]), 2, 4)  # the lower right quarter of a causal square
        Segments([Segment(q_start=2, q_len=2, k_start=0, k_len=2, offset=0)])
    """

    def cut(segments: Segments) -> Segments:
        q_start, q_len, k_start, k_len, offset, window = segments.table.T
        first, last = np.maximum(k_start, start), np.minimum(k_start + k_len, stop)
        table = np.stack((q_start, q_len, first - start, last - first, offset - (first - k_start), window)).T
        return Segments(canonical_table(table)[0])

    return segments.derive(("within", start, stop), cut)
