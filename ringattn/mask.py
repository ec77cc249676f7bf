"""Masks: which keys a query may see, by position in the whole sequence.

    query p sees key j   iff   p - left <= j <= p + right, and both belong to one document

Causal is right = 0, and a side without a limit is -1, as in flash-attn's `window_size`. A mask knows the rule; where
tokens live, and so which segments the rule gives, is `plan.py`'s to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringattn.documents import CuSeqlens, Documents, documents_of

__all__ = ["FAR", "Mask", "WindowSize", "make_mask"]

FAR = 1 << 40  # further than any two tokens are apart

WindowSize = int | tuple[int, int] | None


@dataclass(frozen=True)
class Mask:
    """`causal`, a window (left, right) and documents, each of which may hide keys. -1 is a side without a limit."""

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    documents: Documents | None = None

    def __post_init__(self) -> None:
        left, right = self.window
        causal = self.causal or right == 0  # one mask, one spelling
        object.__setattr__(self, "causal", causal)
        object.__setattr__(self, "window", (left, 0) if causal else (left, right))

    @property
    def left(self) -> int:
        """How far back a query sees."""
        return self.window[0] if self.window[0] >= 0 else FAR

    @property
    def right(self) -> int:
        """How far ahead a query sees."""
        return self.window[1] if self.window[1] >= 0 else FAR

    def __str__(self) -> str:
        parts = ["causal"] if self.causal else []
        if self.causal and self.left < FAR:
            parts.append(f"window {self.left + 1}")
        elif not self.causal and self.window != (-1, -1):
            parts.append(f"window {self.window}")
        if self.documents is not None:
            parts.append(str(self.documents))
        return ", ".join(parts) or "none"

    def within(self, documents: Documents | None) -> Mask:
        """The same causality and window in other documents."""
        return Mask(self.causal, self.window, documents)

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where documents hold more tokens than the sequence."""
        if self.documents is not None and self.documents.end > seq_len:
            raise ValueError(
                f"got cu_seqlens up to {self.documents.end} for a sequence of {seq_len} tokens; cu_seqlens counts the "
                "tokens of all ranks, in one row of the batch"
            )

    def bounds(self, seq_len: int) -> np.ndarray:
        """The first token of each document, and the end of the last one: int64, increasing."""
        if self.documents is None:
            return np.array([0, seq_len] if seq_len else [0])
        return self.documents.bounds

    def pairs_before(self, tokens: np.ndarray, seq_len: int) -> np.ndarray:
        """Visible pairs of all queries before each of the given tokens: the work, accumulated. int64.

        A document of n tokens with m of them before a token adds, with T(m, w) = sum of min(x, w) over x < m,

            T(m, left) + m + T(n, right) - T(n - m, right)

        Example:
            >>> Mask(causal=True).pairs_before(np.array([0, 1, 2, 3, 4]), 4).tolist()
            [0, 1, 3, 6, 10]
        """
        bounds = self.bounds(seq_len)
        length = np.diff(bounds, append=bounds[-1])  # padding is a document without a token
        whole = np.concatenate(([0], np.cumsum(self._pairs(length, length)[:-1])))
        document = np.searchsorted(bounds, tokens, "right") - 1
        n = length[document]
        return whole[document] + self._pairs(np.minimum(tokens - bounds[document], n), n)

    def _pairs(self, m: np.ndarray, n: np.ndarray) -> np.ndarray:
        """Pairs of the first m queries of documents of n tokens."""
        return capped_sum(m, self.left) + m + capped_sum(n, self.right) - capped_sum(n - m, self.right)


def capped_sum(m: np.ndarray, cap: int) -> np.ndarray:
    """T(m, cap): the sum of min(x, cap) over 0 <= x < m."""
    low = np.minimum(m, cap + 1)
    return low * (low - 1) // 2 + (m - low) * min(cap, FAR)


def make_mask(causal: bool = False, window_size: WindowSize = None, cu_seqlens: CuSeqlens | None = None) -> Mask:
    """The mask that attention's options name.

    Args:
        window_size: (left, right) as in flash-attn: a query sees `left` keys before its own position and `right`
            after it, -1 for no limit. With `causal` nothing after it is seen whatever `right` says. Or, with `causal`,
            one number n: the last n keys, its own among them, which is (n - 1, 0).
        cu_seqlens: see `documents.py`; None is one document.

    Raises:
        ValueError, TypeError: a window that says nothing, or no cumulative lengths.

    Example:
        >>> print(make_mask(True, 4096, [0, 300, 1000]))
        causal, window 4096, 2 documents
    """
    return Mask(causal, window_of(causal, window_size), None if cu_seqlens is None else documents_of(cu_seqlens))


def window_of(causal: bool, window_size: WindowSize) -> tuple[int, int]:
    if window_size is None:
        window_size = (-1, -1)
    if isinstance(window_size, int):
        if not causal or window_size < 1:
            raise ValueError(
                f"got window_size={window_size}, causal={causal}; one number counts the keys that a causal query sees, "
                "at least its own: without causal pass (left, right), -1 for a side without a limit"
            )
        return (window_size - 1, 0)
    sides = tuple(window_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= -1 for side in sides):
        raise ValueError(f"got window_size={window_size!r}; pass (left, right), each 0 or more, or -1 for no limit")
    return sides
