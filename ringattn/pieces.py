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
    """Who sees what: rank [N], source [N], segments in canonical form [N, 6], ordered by rank, source, query and key.

    Example:
        >>> from ringattn.layout import make_layout
        >>> rank, source, table = visible_segments(make_layout("contiguous", 4, 2), Mask(causal=True))
        >>> rank.tolist(), source.tolist(), table[:, :5].tolist()
        ([0, 1, 1], [0, 0, 1], [[0, 2, 0, 2, 0], [0, 2, 0, 2, 1], [0, 2, 0, 2, 0]])
    """
    step = next((run.step for runs in layout.runs for run in runs), 1)
    pieces = cut(layout, mask.bounds(layout.seq_len), step)
    query, key = pairs_in_sight(pieces, mask, step)
    which = pieces.rank[query] * layout.ranks + pieces.rank[key]
    if layout.ranks < 256:
        which = which.astype(np.uint16)  # such are sorted in linear time
    order = np.argsort(which, kind="stable")
    query, key = query[order], key[order]
    apart = pieces.start[query] - pieces.start[key]
    table = np.empty((6, len(query)), np.int64)
    table[0], table[1] = pieces.local[query], pieces.length[query]
    table[2], table[3] = pieces.local[key], pieces.length[key]
    table[4] = (apart + mask.right) // step if mask.right < FAR else table[3]
    table[5] = table[4] + (mask.left - apart) // step + 1 if mask.left < FAR else NO_WINDOW
    table, seen = canonical_table(table.T)
    return pieces.rank[query[seen]], pieces.rank[key[seen]], table


def cut(layout: Layout, bounds: np.ndarray, step: int) -> Pieces:
    """All runs of all ranks, cut at the documents' bounds; what lies behind the last bound is left out."""
    runs = [(run.start, rank, run.length) for rank, runs in enumerate(layout.runs) for run in runs]
    start, rank, length = np.array(runs, np.int64).reshape(-1, 3).T
    total = np.cumsum(length)
    local = total - length - np.concatenate(([0], np.cumsum(layout.lengths)))[rank]
    if step == 1:  # then pieces come sorted
        start, rank, length, local = (x[np.argsort(start, kind="stable")] for x in (start, rank, length, local))
    first, last = (np.searchsorted(bounds, token, "right") - 1 for token in (start, start + (length - 1) * step))
    count = np.where(length > 0, np.minimum(last, len(bounds) - 2) - first + 1, 0).clip(0)
    run, within = expand(count)
    document = first[run] + within
    low, high = bounds[document] - start[run], bounds[document + 1] - start[run]
    if step > 1:
        low, high = -(-low // step), -(-high // step)
    low, high = np.maximum(low, 0), np.minimum(high, length[run])
    begin = start[run] + low * step
    pieces = Pieces(rank[run], local[run] + low, begin, high - low, document)
    if step == 1:
        return pieces
    order = np.argsort(begin, kind="stable")
    return Pieces(*(x[order[(high > low)[order]]] for x in pieces))


def pairs_in_sight(pieces: Pieces, mask: Mask, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (query piece, key piece) of one document that may see each other, by their numbers."""
    changes = np.flatnonzero(np.diff(pieces.document, prepend=-1))
    parts = np.diff(changes, append=len(pieces.document))
    low, high = np.repeat(changes, parts), np.repeat(changes + parts, parts)
    cut = np.flatnonzero(high - low > 1)  # most documents are one piece, which sees itself
    start = pieces.start[cut]
    last = start + (pieces.length[cut] - 1) * step
    if mask.right < FAR:
        high[cut] = np.minimum(high[cut], np.searchsorted(pieces.start, last + mask.right, "right"))
    if mask.left < FAR and step == 1:  # else pieces overlap, and their ends are in no order
        ends = pieces.start + pieces.length - 1
        low[cut] = np.maximum(low[cut], np.searchsorted(ends, start - mask.left, "left"))
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
