"""pull: keys and values come into this rank's memory by copy engines, on which no multiprocessor is spent, and
gradients go to their owners', straight from the kernel that makes them or by copy engines as well.

    forward     compute  | own keys, and each other rank's when its flag is up |           if the kernel can wait,
                engines  | heads >> heads >> heads >> |
                compute  | own keys             | others', merged in the epilogue |        otherwise
                engines  | keys >>>>>>>>>>>>>>> |

    backward    compute  | own keys, and each other rank's when its flag is up | sum |     if the kernel can wait,
                engines  | heads >> heads >> |                                             and deliver gradients

                compute  | own keys, later half | others' keys | own keys, earlier half  | sum |   otherwise
                engines  | keys >>>>>>>>>>>>>>> |              | gradients go home >>>>> |

Of every shard only those keys come that this rank's queries look at, end to end on one axis, or each source's in a slot
of its own. They come straight from where their owner has them, whose engines know where they go: so they are under way
as soon as they exist, nobody copies them first, and own keys are read in place.

Ranks wait for each other in `Symmetric.hear` only, in one warp and with a deadline. A launch that waits for flags comes
after it, when everybody has begun the call, and so waits for copy engines only, which need no multiprocessor to get on.
Two regions of memory are used in turn (`transport.interface.Symmetric`), and a third one receives gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringattn.executors.axis import Axis, Piece, span, spans
from ringattn.executors.call import Call
from ringattn.executors.home import Backward
from ringattn.kernels.interface import Arrival, Part, Three, accumulate_dtype
from ringattn.kernels.segments import NO_WINDOW, Segments
from ringattn.plan import Plan
from ringattn.transport.interface import ROWS, WORDS, Mark, Put, Step, Symmetric

__all__ = ["backward", "forward", "region_sizes"]

Pair = tuple[Tensor, Tensor]
KEYS, BACK, FLAGS = range(ROWS)  # rows of words: keys are on their way, or here; gradients are here; flags
GRADIENTS = 2  # the region after the two for keys
BLOCK = 128  # keys that a kernel reads at once, at most, and of which it delivers gradients together


def arrivals(plan: Plan, rank: int) -> list[int]:
    """The other ranks, nearest first."""
    return [(rank + step) % plan.ranks for step in range(1, plan.ranks)]


def departures(plan: Plan, rank: int) -> list[int]:
    """The other ranks in the order in which they get keys: each has its own rank as the nearest source first, so no two
    send to one at the same time."""
    return [(rank - step) % plan.ranks for step in range(1, plan.ranks)]


def slot_of(plan: Plan) -> int:
    """The length of a slot: as long as the longest shard, and a block longer, so that who reads a block at the end of
    one source's keys reads nothing of the next one's."""
    return (-(-max(plan.layout.lengths) // BLOCK) + 1) * BLOCK


def remote_axis(plan: Plan, rank: int, slot: int | None = None) -> Axis:
    """What a rank's queries see of the others' keys; in slots, the first of which is not there: it is own keys'."""
    if slot is None:
        return spans(plan, rank, arrivals(plan, rank))
    axis = spans(plan, rank, [rank, *arrivals(plan, rank)], whole=rank, slot=slot)
    others = tuple(piece._replace(base=piece.base - slot) for piece in axis.pieces[1:])
    return axis._replace(pieces=others, length=max(others[-1].place.stop, 1))  # what is read behind it is zero


def homecomings(plan: Plan, rank: int) -> list[tuple[int, slice, int]]:
    """Who sends gradients of which of a rank's keys, and where in its region they go: (sender, keys, base)."""

    def build() -> list[tuple[int, slice, int]]:
        found, base = [], 0
        for sender in range(plan.ranks):
            start, stop = span(plan, sender, rank)
            if sender != rank:
                found.append((sender, slice(start, stop), base))
                base += stop - start
        return found

    return plan.derive(("homecomings", rank), build)


def delivered(plan: Plan, sender: int, owner: int) -> list[tuple[int, int]]:
    """Stretches (start, stop) of an owner's keys of which a sender has gradients: blocks, counted from the first key
    that it sees, in which it sees any. Between them nothing is written."""

    def build() -> list[tuple[int, int]]:
        start, stop = span(plan, sender, owner)
        _, _, k_start, k_len, _, _ = plan.segments(sender, owner).table.T
        changes = np.zeros(2 - (start - stop) // BLOCK, int)
        np.add.at(changes, (k_start - start) // BLOCK, 1)
        np.add.at(changes, 1 + (k_start + k_len - 1 - start) // BLOCK, -1)
        edges = np.flatnonzero(np.diff(np.cumsum(changes) > 0, prepend=False))
        return [(start + BLOCK * first, min(start + BLOCK * end, stop)) for first, end in edges.reshape(-1, 2).tolist()]

    return plan.derive(("delivered", sender, owner, BLOCK), build)


def region_sizes(plan: Plan, k: Tensor, v: Tensor, gradients: bool, slot: int | None = None) -> tuple[int, int, int]:
    """Bytes of each region, the same on all ranks: the longest axis, twice, and the most gradients."""

    def build() -> tuple[int, int]:
        ranks = range(plan.ranks)
        keys = max(remote_axis(plan, rank, slot).length for rank in ranks)
        home = max(sum(keys.stop - keys.start for _, keys, _ in homecomings(plan, rank)) for rank in ranks)
        return keys, home

    keys, home = plan.derive(("regions", slot), build)
    width = token_width(k, v)
    nbytes, home_bytes = (
        -(-n * width * itemsize // 256) * 256
        for n, itemsize in ((keys, k.element_size()), (home * gradients, accumulate_dtype(k).itemsize))
    )
    return nbytes, nbytes, home_bytes


class Map:
    """Where everything of a call lies in symmetric memory: made once for each of the two regions for keys, and again
    when memory moves.

    What has come is [B, M, G, D] and [B, M, G, E]. For a launch that waits for flags it comes by groups of heads, of
    all sources: a tile of queries needs all sources' keys, but of one head, before it is done.
    """

    def __init__(self, call: Call, symmetric: Symmetric, k: Tensor, v: Tensor, gradients: bool, slot: int | None):
        plan, rank = call.plan, call.rank
        self.generation = symmetric.generation
        self.turn = symmetric.calls % 2
        self.call, self.symmetric, self.like = call, symmetric, (k, v)
        self.slot, self.groups = slot, call.schedule.head_groups if slot is not None else 1
        axis = remote_axis(plan, rank, slot)
        self.segments, self.poison = axis.segments, symmetric.region(rank, self.turn)
        self.k, self.v = self.keys(rank)
        self.gaps = [] if slot is None else self.between(axis, gradients)
        self.begun = tuple(self.word(peer, KEYS) for peer in departures(plan, rank) if slot is not None)
        self.puts = self.departing()
        self.flags = self.flags_of(rank)
        if gradients:
            self.home_poison = symmetric.region(rank, GRADIENTS)
            parts = ((sender, Part(mine, *self.home(rank, sender))) for sender, mine, _ in homecomings(plan, rank))
            self.parts = [part.within(*keys) for sender, part in parts for keys in delivered(plan, sender, rank)]
            self.homes = [self.home(piece.source, rank) for piece in axis.pieces]
            self.delivery = [both(*pair) for pair in self.homes if slot is not None]
            self.backs = tuple(self.word(piece.source, BACK) for piece in axis.pieces)
            self.returns = self.returning(axis) if slot is None else ()
        del self.like

    def keys(self, rank: int) -> Pair:
        """What comes to a rank, [B, M, G, D] and [B, M, G, E]."""
        length = remote_axis(self.call.plan, rank, self.slot).length
        shapes = [(x.shape[0], length, *x.shape[2:]) for x in self.like]
        return views(self.symmetric.region(rank, self.turn), self.like[0].dtype, *shapes)

    def word(self, rank: int, row: int) -> Mark:
        """The word of a rank that is this one's."""
        return Mark(self.symmetric.words(rank)[row, self.call.rank : self.call.rank + 1])

    def flags_of(self, rank: int) -> Tensor:
        """Flags of a rank, [sources, groups], in the order of its axis. One, two, four and eight groups have places of
        their own: while a slow source still sends to this rank in one call, another one may begin the next call, with
        other groups, and its flag must not be taken for the slow one's."""
        sources = self.call.plan.ranks - 1
        each = -(-sources // 4) * 4  # tables begin at multiples of 16 bytes
        place = slice(each * (self.groups - 1), each * (self.groups - 1) + sources * self.groups)
        assert place.stop <= WORDS
        return self.symmetric.words(rank)[FLAGS, place].view(sources, self.groups)

    def departing(self) -> tuple[Step, ...]:
        """Own keys and values to who looks at them."""
        plan, me = self.call.plan, self.call.rank
        peers, waits = departures(plan, me), self.slot is not None
        puts: list[Step] = []
        for group in range(self.groups):
            for peer in peers:
                pieces = remote_axis(plan, peer, self.slot).pieces
                place = next(index for index, piece in enumerate(pieces) if piece.source == me)
                puts += self.put(peer, pieces[place], self.heads(group))
                flag = self.flags_of(peer)[place, group : group + 1]
                puts.append(Mark(flag) if waits else self.word(peer, KEYS))
        return tuple(puts)

    def put(self, peer: int, piece: Piece, heads: slice) -> list[Put]:
        """Copies of some heads of own keys and values."""
        return [
            Put(whole[batch, piece.place, heads], number, (batch, slice(piece.start, piece.stop), heads))
            for number, whole in enumerate(self.keys(peer))
            for batch in range(whole.shape[0])
            if piece.stop > piece.start
        ]

    def between(self, axis: Axis, gradients: bool) -> list[Tensor]:
        """What a launch may read behind a source's keys and before the next one's. It must be finite: a masked value is
        still multiplied by zero, and in a backward a key is too."""
        _, _, k_start, k_len, _, window = axis.segments.table.T
        if not ((k_start % BLOCK).any() or (k_len % BLOCK).any() or (window < NO_WINDOW).any()):
            return []
        behind = [slice(piece.place.stop, piece.place.stop + BLOCK) for piece in axis.pieces[:-1]]
        return [x[:, keys] for x in (self.k, self.v)[not gradients :] for keys in behind]

    def home(self, owner: int, sender: int) -> Pair:
        """Where `sender` puts its gradients of the keys of `owner`, [B, M, G, D] and [B, M, G, E]."""
        k, v = self.like
        keys, base = next((keys, base) for who, keys, base in homecomings(self.call.plan, owner) if who == sender)
        dtype, length = accumulate_dtype(k), keys.stop - keys.start
        memory = self.symmetric.region(owner, GRADIENTS)[base * token_width(k, v) * dtype.itemsize :]
        return views(memory, dtype, (k.shape[0], length, *k.shape[2:]), (v.shape[0], length, *v.shape[2:]))

    def returning(self, axis: Axis) -> tuple[Step, ...]:
        """Gradients of the others' keys to their owners, and that they are there."""
        puts: list[Step] = []
        for piece, pair, back in zip(axis.pieces, self.homes, self.backs, strict=True):
            if piece.stop > piece.start:
                puts += [Put(home, number, (slice(None), piece.place)) for number, home in enumerate(pair)]
            puts.append(back)
        return tuple(puts)

    def heads(self, group: int) -> slice:
        """The key/value heads of a group."""
        each = self.like[0].shape[2] // self.groups
        return slice(group * each, (group + 1) * each)

    def bring(self, k: Tensor, v: Tensor) -> None:
        """Sends own keys to the others, and lets theirs come."""
        tensors = together(k), together(v)  # may take multiprocessors, for which nobody shall wait who has heard
        self.symmetric.begin(self.begun)
        self.symmetric.copy(self.puts, tensors)

    def arrival(self) -> Arrival:
        """What a launch that waits for flags is told; everybody must have begun the call."""
        assert self.slot is not None
        for gap in self.gaps:
            gap.zero_()
        symmetric = self.symmetric
        symmetric.hear(KEYS, self.poison)
        return Arrival(self.k, self.v, self.flags, symmetric.count, self.slot, symmetric.patience, symmetric.late)


def map_of(call: Call, k: Tensor, v: Tensor, gradients: bool) -> Map:
    """The map for this turn."""
    symmetric = call.symmetric
    assert symmetric is not None
    name = gradients, symmetric.calls % 2
    found = call.derived.get(name)
    if found is None or found.generation != symmetric.generation:
        waits = call.schedule.at_once if gradients else call.schedule.flags
        slot = slot_of(call.plan) if waits else None
        symmetric.reserve(region_sizes(call.plan, k, v, gradients, slot))
        found = call.derived[name] = Map(call, symmetric, k, v, gradients, slot)
    return found


def together(x: Tensor) -> Tensor:
    """x [B, L, G, D] with the heads of a token side by side, as a slice of a projection has them."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def token_width(k: Tensor, v: Tensor) -> int:
    """Numbers that a token's keys and values hold, in all sequences of the batch."""
    return k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3])


def both(first: Tensor, second: Tensor) -> Tensor:
    """Two tensors alike, one right behind the other in memory, as one [2, ...]."""
    assert first.shape == second.shape
    assert second.data_ptr() - first.data_ptr() == first.nbytes
    return first.as_strided((2, *first.shape), (first.numel(), *first.stride()))


def views(memory: Tensor, dtype: torch.dtype, first: tuple[int, ...], second: tuple[int, ...]) -> Pair:
    """Two tensors one behind the other in a region."""
    flat, cut = memory.view(dtype), torch.Size(first).numel()
    return flat[:cut].view(first), flat[cut : cut + torch.Size(second).numel()].view(second)


def forward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, running: Pair | None = None, *, into: Pair | None = None
) -> Pair:
    """Attention of this rank's queries over the whole sequence; see `ring.forward`. out and lse may be in `into`."""
    there = map_of(call, k, v, gradients=False)
    symmetric, attend = there.symmetric, call.kernel.forward
    there.bring(k, v)
    if there.slot is not None:
        waiting: Any = attend  # only a kernel that can is told to
        how = {"scale": call.scale, "running": running, "out_dtype": q.dtype, "arrival": there.arrival()}
        result = waiting(q, k, v, there.segments, **how, **({} if into is None else {"into": into}))
    else:
        own: Segments = call.plan.segments(call.rank, call.rank)
        own_dtype = None if there.segments else q.dtype
        result = attend(q, k, v, own, scale=call.scale, running=running, out_dtype=own_dtype)
        symmetric.hear(KEYS, there.poison)
        if there.segments:
            result = attend(q, there.k, there.v, there.segments, scale=call.scale, running=result, out_dtype=q.dtype)
    symmetric.finish()
    return result


def backward(
    call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
    *, into: Three | None = None,
) -> Three:  # fmt: skip
    """Gradients of this rank's queries, keys and values, in `into` if given; see `ring.backward`."""
    there = map_of(call, k, v, gradients=True)
    symmetric = there.symmetric
    there.bring(k, v)
    work = Backward(call, dout, q, k, v, out, lse, dlse)
    if call.schedule.at_once:
        work.all_keys(there.segments, there.arrival(), there.delivery)
        symmetric.mark(there.backs)
    else:
        work.own_keys(work.first)
        symmetric.hear(KEYS, there.poison)
        grads = work.differentiate(there.k, there.v, there.segments)
        symmetric.copy(there.returns, grads)
        work.own_keys(work.last)
    symmetric.hear(BACK, there.home_poison)
    symmetric.finish()
    return work.settle(there.parts, into)
