"""Segments: which keys a query row may see, in the one vocabulary that every kernel reads.

A segment is a rectangle of query rows and keys with one rule inside it:

    row i (from q_start) sees key j (from k_start)   iff   i + offset - window < j <= i + offset

Every mask and every layout is a list of such rectangles that do not overlap. Rectangles that nobody
sees are never listed, so nothing is computed and thrown away.

       keys 0 1 2 3 4            Segment(q_start=0, q_len=3, k_start=0, k_len=5, offset=1)
    row 0   x x . . .
    row 1   x x x . .            canonical form: offset=1, k_len=4 (nobody sees the fifth key)
    row 2   x x x x .
                             with window=2 row 0 sees keys 0 and 1, row 1 keys 1 and 2, row 2 keys 2 and 3
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, TypeVar

__all__ = ["NO_WINDOW", "Segment", "Segments"]

T = TypeVar("T")
NO_WINDOW = 1 << 30  # longer than any sequence, and sums with a position still fit in 32 bits


class Segment(NamedTuple):
    """A rectangle of `q_len` query rows by `k_len` keys, seen up to a shifted diagonal and `window` keys back."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    offset: int
    window: int = NO_WINDOW

    def __repr__(self) -> str:
        shown = self._asdict()
        if self.window == NO_WINDOW:
            del shown["window"]
        return f"Segment({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def canonical(self) -> Segment | None:
        """The same pairs with every row seeing a key and every key seen by a row; None if there are none.

        In canonical form 0 <= offset <= k_len - 1, and a window that hides nothing is `NO_WINDOW`; so
        offset == k_len - 1 without a window means "no mask inside".

        Example:
            >>> Segment(0, 3, 0, 5, 1).canonical()
            Segment(q_start=0, q_len=3, k_start=0, k_len=4, offset=1)
            >>> Segment(0, 4, 8, 2, -1).canonical()
            Segment(q_start=1, q_len=3, k_start=8, k_len=2, offset=0)
            >>> Segment(0, 4, 0, 4, -4).canonical() is None
            True
            >>> Segment(0, 9, 0, 6, 2, window=2).canonical()  # key 0 is out of sight, and so are all from row 5 on
            Segment(q_start=0, q_len=5, k_start=1, k_len=5, offset=1, window=2)
        """
        q_start, q_len, k_start, k_len, offset, window = self
        blind = max(-offset, 0)  # leading rows that see nothing
        q_start, q_len, offset = q_start + blind, q_len - blind, offset + blind
        unseen = max(offset - window + 1, 0)  # leading keys that the first row, and so every row, has left behind
        k_start, k_len, offset = k_start + unseen, k_len - unseen, offset - unseen
        q_len = min(q_len, k_len + window - 1 - offset)
        k_len = min(k_len, q_len + offset)
        if q_len <= 0 or k_len <= 0 or window <= 0:
            return None
        hides = q_len - 1 + offset >= window
        excess = max(offset - (k_len - 1), 0)
        return Segment(q_start, q_len, k_start, k_len, offset - excess, window - excess if hides else NO_WINDOW)

    @property
    def unmasked(self) -> bool:
        """Whether every row sees every key."""
        return self.offset >= self.k_len - 1 and self.q_len - 1 + self.offset < self.window

    @property
    def pairs(self) -> int:
        """Number of visible (row, key) pairs: the work of the segment.

        Example:
            >>> Segment(0, 3, 0, 4, 1).pairs  # rows see 2, 3 and 4 keys
            9
            >>> Segment(0, 3, 0, 4, 1, window=2).pairs
            6
        """
        return self._pairs_up_to(self.offset) - self._pairs_up_to(self.offset - self.window)

    def _pairs_up_to(self, offset: int) -> int:
        """Pairs of row i and key j <= i + offset."""
        blind = min(max(-offset, 0), self.q_len)
        rows, first = self.q_len - blind, offset + blind + 1  # the first of these rows sees so many keys
        partial = min(max(self.k_len - first, 0), rows)  # rows that do not see every key
        return partial * first + partial * (partial - 1) // 2 + (rows - partial) * self.k_len


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
