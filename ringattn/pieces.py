"""Layout x mask -> segments, for all ranks at once.

A rank's runs are cut where documents begin, so that a piece is a stretch of one document that a rank holds without a
gap. Of two pieces of one document, with positions q + i step and k + j step, query i sees key j iff

    q + i step - left <= k + j step <= q + i step + right

    j <= i + offset                 offset = floor((q - k + right) / step)
    j >  i + offset - window        window = offset - ceil((q - k - left) / step) + 1

Documents come by the ten thousand, so there is no loop over them: pieces are arrays, sorted by position, and the
pieces that one may see are a range of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ringattn.kernels.segments import NO_WINDOW, canonical_table
from ringattn.layout import Layout
from ringattn.mask import FAR, Mask

__all__ = ["visible_segments"]


class Pieces(NamedTuple):
    """Stretches of one document on one rank, sorted by their first token: int64 [N] each."""

    rank: np.ndarray
    local: np.ndarray  # where it begins in the rank's shard
    start: np.ndarray  # its first token
    length: np.ndarray
    document: np.ndarray


def visible_segments(layout: Layout, mask: Mask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who sees what: rank [N], source [N], and segments in canonical form [N, 6], ordered by query and key.

    Example:
        >>> from ringattn.layout import make_layout
        >>> rank, source, table = visible_segments(make_layout("contiguous", 4, 2), Mask(causal=True))
        >>> rank.tolist(), source.tolist(), table[:, :5].tolist()
        ([0, 1, 1], [0, 0, 1], [[0, 2, 0, 2, 0], [0, 2, 0, 2, 1], [0, 2, 0, 2, 0]])
    """
    step = next((run.step for runs in layout.runs for run in runs), 1)
    pieces = cut(layout, mask.bounds(layout.seq_len), step)
    query, key = pairs_in_sight(pieces, mask, step)
    apart = pieces.start[query] - pieces.start[key]
    q_len, k_len = pieces.length[query], pieces.length[key]
    offset = (apart + mask.right) // step if mask.right < FAR else k_len
    window = offset + (mask.left - apart) // step + 1 if mask.left < FAR else np.full(len(query), NO_WINDOW)
    table = np.stack((pieces.local[query], q_len, pieces.local[key], k_len, offset, window)).T
    table, seen = canonical_table(table)
    return pieces.rank[query[seen]], pieces.rank[key[seen]], table


def cut(layout: Layout, bounds: np.ndarray, step: int) -> Pieces:
    """All runs of all ranks, cut at the documents' bounds; what lies behind the last bound is left out."""
    runs = [(rank, run.start, run.length) for rank, runs in enumerate(layout.runs) for run in runs]
    rank, start, length = np.array(runs, np.int64).reshape(-1, 3).T
    total = np.cumsum(length)
    local = total - length - np.concatenate(([0], np.cumsum(layout.lengths)))[rank]
    first, last = (np.searchsorted(bounds, token, "right") - 1 for token in (start, start + (length - 1) * step))
    count = np.where(length > 0, np.minimum(last, len(bounds) - 2) - first + 1, 0).clip(0)
    run, within = expand(count)
    document = first[run] + within
    low = np.maximum(-((start[run] - bounds[document]) // step), 0)
    high = np.minimum(-((start[run] - bounds[document + 1]) // step), length[run])
    run, document, low, high = (x[high > low] for x in (run, document, low, high))
    begin = start[run] + low * step
    order = np.argsort(begin, kind="stable")
    return Pieces(*(x[order] for x in (rank[run], local[run] + low, begin, high - low, document)))


def pairs_in_sight(pieces: Pieces, mask: Mask, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (query piece, key piece) of one document that may see each other, by their numbers."""
    low = np.searchsorted(pieces.document, pieces.document, "left")
    high = np.searchsorted(pieces.document, pieces.document, "right")
    last = pieces.start + (pieces.length - 1) * step
    if mask.right < FAR:
        high = np.minimum(high, np.searchsorted(pieces.start, last + mask.right, "right"))
    if mask.left < FAR and step == 1:  # else pieces overlap, and their ends are in no order
        low = np.maximum(low, np.searchsorted(last, pieces.start - mask.left, "left"))
    query, within = expand(np.maximum(high - low, 0))
    return query, low[query] + within


def expand(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every i as often as count[i] says, and which of its copies each is.

    Example:
        >>> [x.tolist() for x in expand(np.array([2, 0, 3]))]
        [[0, 0, 2, 2, 2], [0, 1, 0, 1, 2]]
    """
    which = np.repeat(np.arange(len(count)), count)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
