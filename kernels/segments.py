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

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

__all__ = ["NO_WINDOW", "Segment", "Segments", "canonical_table", "count_pairs"]

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


class Segments(Sequence[Segment]):
    """An immutable list of segments that remembers what kernels derive from it.

    Packed documents are segments by the ten thousand, so the list is an array, and its elements are made when asked
    for. Lowering a list to tiles and moving it to a device costs more than a launch, and plans are reused by every
    layer and step; `derive` does it once per list.

    Attributes:
        table (np.ndarray): int64 [N, 6], a row per segment, read-only.
    """

    def __init__(self, segments: Iterable[Segment] | np.ndarray = ()):
        if not isinstance(segments, np.ndarray):
            segments = np.array([*map(tuple, segments)], np.int64).reshape(-1, len(Segment._fields))
        self.table = segments.view()
        self.table.flags.writeable = False
        self._derived: dict[Hashable, Any] = {}

    @property
    def pairs(self) -> int:
        """Visible pairs of all segments.

        Example:
            >>> Segments([Segment(0, 3, 0, 4, 1), Segment(0, 3, 0, 4, 1, window=2)]).pairs
            15
        """
        return int(count_pairs(self.table).sum())

    def derive(self, key: Hashable, build: Callable[[Segments], T]) -> T:
        """What `build` makes of this list, made once per `key`."""
        if key not in self._derived:
            self._derived[key] = build(self)
        return self._derived[key]

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Segment: ...

    @overload
    def __getitem__(self, index: slice) -> Segments: ...

    def __getitem__(self, index: int | slice) -> Segment | Segments:
        if isinstance(index, slice):
            return Segments(self.table[index])
        return Segment(*self.table[index].tolist())

    def __iter__(self) -> Iterator[Segment]:
        return itertools.starmap(Segment, self.table.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segments) and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash(self.table.tobytes())

    def __repr__(self) -> str:
        return f"Segments({list(self)})"


def canonical_table(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`Segment.canonical` of every row of a table [N, 6], empty ones left out, and which rows are left. Columns are
    contiguous, because work goes by columns."""
    q_start, q_len, k_start, k_len, offset, window = table.T
    blind = np.maximum(-offset, 0)
    q_start, q_len, offset = q_start + blind, q_len - blind, offset + blind
    unseen = np.maximum(offset - window + 1, 0)
    k_start, k_len, offset = k_start + unseen, k_len - unseen, offset - unseen
    q_len = np.minimum(q_len, k_len + window - 1 - offset)
    k_len = np.minimum(k_len, q_len + offset)
    hides = q_len - 1 + offset >= window
    excess = np.maximum(offset - (k_len - 1), 0)
    columns = (q_start, q_len, k_start, k_len, offset - excess, np.where(hides, window - excess, NO_WINDOW))
    left = ((q_len > 0) & (k_len > 0) & (window > 0)).nonzero()[0]
    canonical = np.stack(columns)
    return (canonical if len(left) == len(q_len) else canonical[:, left]).T, left


def count_pairs(table: np.ndarray) -> np.ndarray:
    """`Segment.pairs` of every row of a table [N, 6]."""
    _, q_len, _, k_len, offset, window = table.T

    def up_to(offset: np.ndarray) -> np.ndarray:
        blind = np.clip(-offset, 0, q_len)
        rows, first = q_len - blind, offset + blind + 1
        partial = np.clip(k_len - first, 0, rows)
        return partial * first + partial * (partial - 1) // 2 + (rows - partial) * k_len

    return up_to(offset) - up_to(offset - window)
