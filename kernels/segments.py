"""Segments: which keys a query row may see, in the one vocabulary that every kernel reads.

A segment is a rectangle of query rows and keys with one rule inside it:

    row i (from q_start) sees key j (from k_start)   iff   j <= i + offset

Every mask and every layout is a list of such rectangles that do not overlap. Rectangles that nobody
sees are never listed, so nothing is computed and thrown away.

       keys 0 1 2 3 4            Segment(q_start=0, q_len=3, k_start=0, k_len=5, offset=1)
    row 0   x x . . .
    row 1   x x x . .            canonical form: offset=1, k_len=4 (nobody sees the fifth key)
    row 2   x x x x .
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, TypeVar

__all__ = ["Segment", "Segments"]

T = TypeVar("T")


class Segment(NamedTuple):
    """A rectangle of `q_len` query rows by `k_len` keys, seen up to a shifted diagonal."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    offset: int

    def canonical(self) -> Segment | None:
        """The same pairs with every row seeing a key and every key seen by a row; None if there are none.

        In canonical form 0 <= offset <= k_len - 1, and offset == k_len - 1 means "no mask inside".

        Example:
            >>> Segment(0, 3, 0, 5, 1).canonical()
            Segment(q_start=0, q_len=3, k_start=0, k_len=4, offset=1)
            >>> Segment(0, 4, 8, 2, -1).canonical()
            Segment(q_start=1, q_len=3, k_start=8, k_len=2, offset=0)
            >>> Segment(0, 4, 0, 4, -4).canonical() is None
            True
        """
        blind = max(-self.offset, 0)  # leading rows that see nothing
        q_len, offset = self.q_len - blind, self.offset + blind
        k_len = min(self.k_len, q_len + offset)
        if q_len <= 0 or k_len <= 0:
            return None
        return Segment(self.q_start + blind, q_len, self.k_start, k_len, min(offset, k_len - 1))

    @property
    def unmasked(self) -> bool:
        """Whether every row sees every key."""
        return self.offset >= self.k_len - 1

    @property
    def pairs(self) -> int:
        """Number of visible (row, key) pairs: the work of the segment.

        Example:
            >>> Segment(0, 3, 0, 4, 1).pairs  # rows see 2, 3 and 4 keys
            9
        """
        segment = self.canonical()
        if segment is None:
            return 0
        partial = min(segment.k_len - segment.offset - 1, segment.q_len)  # rows that do not see every key
        return partial * (segment.offset + 1) + partial * (partial - 1) // 2 + (segment.q_len - partial) * segment.k_len


class Segments(tuple[Segment, ...]):
    """An immutable list of segments that remembers what kernels derive from it.

    Lowering a list to tiles and moving it to a device costs more than a launch, and plans are reused by
    every layer and step; `derive` does it once per list.
    """

    _derived: dict[Hashable, Any]

    def __new__(cls, segments: Iterable[Segment] = ()) -> Segments:
        self = super().__new__(cls, segments)
        self._derived = {}
        return self

    def derive(self, key: Hashable, build: Callable[[Segments], T]) -> T:
        """What `build` makes of this list, made once per `key`."""
        if key not in self._derived:
            self._derived[key] = build(self)
        return self._derived[key]
