"""The balanced layout: every rank gets as many tokens as the others, and as much attention.

The sequence is cut into P * k equal chunks, and each rank takes k of them. Equal counts are what training needs: the
activations that a rank keeps, and its work outside attention, grow with its tokens. So counts differ by k tokens at
most, and only attention is left to balance. What a chunk costs is the number of its visible pairs, whatever mask made
them, so one planner serves dense causal masks, windows and documents.

    for k = 1, 2, 4, ...                           the coarsest cut that balances: long runs, few segments
        from chunks in order, and from chunks dealt out, the heaviest first and each to the lightest rank:
            while the heaviest rank gains by it: swap the two chunks that bring it and another rank closest
        take what is balanced to 2% and needs the fewest keys from other ranks

Chunks in order keep documents whole; dealt out, two chunks a rank, a dense causal mask is zigzag. Everything is
integer arithmetic with ties broken by index, so all ranks find the same plan. (Longest processing time first: Graham,
SIAM J. Appl. Math. 17, 1969; here with equally many chunks for each rank.)
"""

from __future__ import annotations

import heapq

import numpy as np

from ringattn.mask import Mask

__all__ = ["balanced_chunks"]

ENOUGH = 0.02  # how much more than the mean the busiest rank may do
SHORTEST = 128  # tokens of a chunk: a tile of queries
MOST = 32  # chunks of a rank, a power of two


def balanced_chunks(seq_len: int, ranks: int, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Where each of P * k chunks begins, int64 [P k + 1], and which rank takes it, int64 [P k]."""
    found = []
    finest = np.arange(ranks * MOST + 1) * seq_len // (ranks * MOST)
    work_before = mask.pairs_before(finest, seq_len)
    per_rank = 1
    while True:
        starts, work = finest[:: MOST // per_rank], np.diff(work_before[:: MOST // per_rank])
        in_order = np.arange(ranks * per_rank) // per_rank
        for owner in (in_order, deal(work, ranks)) if per_rank > 1 else (in_order,):
            owner = refine(owner, work, ranks)
            excess = imbalance(owner, work, ranks)
            # Beyond what is enough, fewer keys from elsewhere are worth more than a better balance.
            found.append((max(excess, ENOUGH), keys_from_elsewhere(owner, starts, mask, seq_len, ranks), starts, owner))
        best = min(found, key=lambda each: each[:2])
        per_rank *= 2
        if best[0] <= ENOUGH or per_rank > MOST or seq_len < ranks * per_rank * SHORTEST:
            return best[2], in_order_of_appearance(best[3], ranks)


def deal(work: np.ndarray, ranks: int) -> np.ndarray:
    """Chunks to ranks, the heaviest chunk first and each to the lightest rank that may take one more.

    Example:
        >>> deal(np.array([1, 2, 3, 4]), 2).tolist()
        [0, 1, 1, 0]
    """
    per_rank = len(work) // ranks
    owner = np.empty_like(work)
    lightest = [(0, rank, 0) for rank in range(ranks)]
    for chunk in np.argsort(-work, kind="stable").tolist():
        load, rank, held = heapq.heappop(lightest)
        owner[chunk] = rank
        if held + 1 < per_rank:
            heapq.heappush(lightest, (load + int(work[chunk]), rank, held + 1))
    return owner


def refine(owner: np.ndarray, work: np.ndarray, ranks: int) -> np.ndarray:
    """Swaps chunks of the busiest rank with other ranks' as long as the busier of the two then does less.

    At most so often that a start which needs more has lost what it was chosen for.
    """
    owner = owner.copy()
    loads = np.bincount(owner, work, ranks).astype(np.int64)
    mean = work.sum() / ranks
    for _ in range(2 * ranks):
        busiest = int(loads.argmax())
        if loads[busiest] <= (1 + ENOUGH / 2) * mean:
            break
        mine, others = (owner == busiest).nonzero()[0], (owner != busiest).nonzero()[0]
        moved = work[mine, None] - work[None, others]
        after = np.maximum(loads[busiest] - moved, loads[owner[others]] + moved)
        give, take = divmod(int(after.argmin()), len(others))
        if after[give, take] >= loads[busiest]:
            break
        give, take = mine[give], others[take]
        peer = owner[take]
        loads[busiest] -= work[give] - work[take]
        loads[peer] += work[give] - work[take]
        owner[give], owner[take] = peer, busiest
    return owner


def in_order_of_appearance(owner: np.ndarray, ranks: int) -> np.ndarray:
    """The same shares, the ranks numbered by their first chunk: what is near in the sequence is near in the ring.

    Example:
        >>> in_order_of_appearance(np.array([1, 0, 0, 1]), 2).tolist()
        [0, 1, 1, 0]
    """
    first = np.full(ranks, len(owner))
    np.minimum.at(first, owner, np.arange(len(owner)))
    return np.argsort(np.argsort(first, kind="stable"), kind="stable")[owner]


def imbalance(owner: np.ndarray, work: np.ndarray, ranks: int) -> float:
    """How much more than the mean the busiest rank does, as a share of the mean."""
    loads = np.bincount(owner, work, ranks)
    return float(loads.max() / loads.mean() - 1) if loads.any() else 0.0


def keys_from_elsewhere(owner: np.ndarray, starts: np.ndarray, mask: Mask, seq_len: int, ranks: int) -> int:
    """Keys that ranks need and do not hold, counted in whole chunks and once for each rank."""
    bounds = mask.bounds(seq_len)
    ends = np.append(bounds[1:], bounds[-1])
    first, last = starts[:-1], starts[1:] - 1
    from_token = np.maximum(bounds[np.searchsorted(bounds, first, "right") - 1], first - mask.left)
    to_token = np.minimum(ends[np.searchsorted(bounds, last, "right") - 1] - 1, last + mask.right)
    low, high = (np.searchsorted(starts, token, "right") - 1 for token in (from_token, to_token))
    edges = np.zeros((ranks, len(owner) + 1), np.int64)
    some = high >= low
    np.add.at(edges, (owner[some], low[some]), 1)
    np.add.at(edges, (owner[some], np.minimum(high[some], len(owner) - 1) + 1), -1)
    needed = edges.cumsum(1)[:, :-1] > 0
    needed[owner, np.arange(len(owner))] = False
    return int((needed * np.diff(starts)).sum())
