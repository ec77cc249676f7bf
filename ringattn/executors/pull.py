"""pull: copy engines bring keys and values from the other ranks' memory, and take gradients there; no SM is spent.

    forward     compute  | pack | meet | all keys, each when its flag is up                   |  if the kernel can wait,
                engines                | head >> head >> heads >>>> heads >>>>>>>> |
                compute  | pack | meet | own keys          | others' keys, merged in the epilogue |  else this,
                engines                | keys come >>>>>>> |
                compute  | pack | meet |                   | all keys |                              or, if short, this
                engines                | keys come >>>>>>> |

    backward    compute  | pack | meet | own, later half | others' keys | own, earlier half | collect | sum |
                engines                | keys come >>>>> |              | gradients go home |

Of every shard only the keys that this rank's queries look at are brought, end to end on one axis (`axis.spans`). Ranks
wait for each other in `meet` and `collect` only, on the GPU and with a deadline. Two regions of memory are used in
turn, so that no rank waits until its keys have been read (`transport.interface.Symmetric`); a third one receives
gradients. A launch that waits never waits for another rank, only for this rank's copy engines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringattn.executors.axis import Axis, Piece, span, spans
from ringattn.executors.call import Call
from ringattn.executors.home import Backward, Part
from ringattn.kernels.interface import Arrival, accumulate_dtype
from ringattn.kernels.segments import Segments
from ringattn.plan import Plan
from ringattn.transport.interface import Mark, Move, Symmetric

__all__ = ["backward", "forward", "region_sizes"]

Pair = tuple[Tensor, Tensor]
GRADIENTS = 2  # the region after the two for keys
BLOCK = 128  # keys that a kernel reads at once, at most


class Keys(NamedTuple):
    """Keys and values on an axis, [B, M, G, D] and [B, M, G, E], and what is seen of them."""

    k: Tensor
    v: Tensor
    segments: Segments


def arrivals(plan: Plan, rank: int) -> list[int]:
    """The other ranks, nearest first, so that not all pull from the same one at once."""
    return [(rank + step) % plan.ranks for step in range(1, plan.ranks)]


def axis_of(plan: Plan, rank: int, slot: int | None = None) -> Axis:
    """This rank's own keys, which the others read at that place, and behind them what it brings from the others."""
    return spans(plan, rank, [rank, *arrivals(plan, rank)], whole=rank, slot=slot)


def remote_axis(plan: Plan, rank: int) -> Axis:
    """The part behind its own keys."""
    return spans(plan, rank, arrivals(plan, rank))


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


def region_sizes(plan: Plan, k: Tensor, v: Tensor, gradients: bool, slot: int | None = None) -> tuple[int, int, int]:
    """Bytes of each region, the same on all ranks: the longest axis, twice, and the most gradients."""

    def build() -> tuple[int, int]:
        ranks = range(plan.ranks)
        keys = max(axis_of(plan, rank, slot).length for rank in ranks)
        home = max(sum(keys.stop - keys.start for _, keys, _ in homecomings(plan, rank)) for rank in ranks)
        return keys, home

    keys, home = plan.derive(("regions", slot), build)
    width = token_width(k, v)
    nbytes, home_bytes = (
        -(-n * width * itemsize // 256) * 256
        for n, itemsize in ((keys, k.element_size()), (home * gradients, accumulate_dtype(k).itemsize))
    )
    return nbytes, nbytes, home_bytes


def slot_of(plan: Plan) -> int | None:
    """The length of a slot in which a launch can wait for a source's keys; None if some source's keys would end within
    a block, where the kernel would also read what it has not waited for."""

    def build() -> int | None:
        pairs = [(rank, source) for rank in range(plan.ranks) for source in range(plan.ranks)]
        lengths = [stop - start for start, stop in (span(plan, *pair) for pair in pairs)]
        return max(plan.layout.lengths) if all(length % BLOCK == 0 for length in lengths) else None

    return plan.derive("slot", build)


class Map:
    """Where everything of a call lies in symmetric memory: made once for each of the two regions for keys, and again
    when memory moves.

    Keys are [M, B, G, D], values [M, B, G, E] behind them: few, long copies. For a launch that waits for flags they are
    [B, G, M, D] and [B, G, M, E], each source in a slot, and come head group by head group: a tile of queries needs all
    sources' keys, but of one head, before it is done.
    """

    def __init__(self, call: Call, symmetric: Symmetric, k: Tensor, v: Tensor, gradients: bool):
        plan, rank = call.plan, call.rank
        self.generation = symmetric.generation
        self.turn = symmetric.meetings % 2
        self.call, self.symmetric, self.like = call, symmetric, (k, v)
        self.slot = slot_of(plan) if call.schedule.flags and not gradients else None
        own, length = axis_of(plan, rank, self.slot), plan.layout.lengths[rank]
        mine = self.keys(rank)
        self.packed = mine[0][:, :length], mine[1][:, :length]
        self.pulls = tuple(
            pull for heads in self.head_groups() for piece in own.pieces[1:] for pull in self.pull(piece, heads)
        )
        self.all = Keys(*mine, own.segments)
        if self.slot is None:
            self.others = Keys(mine[0][:, length:], mine[1][:, length:], remote_axis(plan, rank).segments)
        if gradients:
            self.parts = [Part(mine, *self.home(rank, sender)) for sender, mine, _ in homecomings(plan, rank)]
            self.homes = [
                (piece.place, self.home(piece.source, rank))
                for piece in remote_axis(plan, rank).pieces
                if piece.stop > piece.start
            ]
        del self.like

    def keys(self, rank: int) -> Pair:
        """A rank's axis, [B, M, G, D] and [B, M, G, E]."""
        length = axis_of(self.call.plan, rank, self.slot).length
        memory = self.symmetric.region(rank, self.turn)
        shapes = [(length, x.shape[0], *x.shape[2:]) for x in self.like]
        if self.slot is not None:
            shapes = [(batch, heads, length, dim) for length, batch, heads, dim in shapes]
        k, v = views(memory, self.like[0].dtype, *shapes)
        return (k.transpose(0, 1), v.transpose(0, 1)) if self.slot is None else (k.transpose(1, 2), v.transpose(1, 2))

    def head_groups(self) -> list[slice]:
        """Heads that come together: all, or first few and then more, so that the first come soon."""
        heads = self.like[0].shape[2]
        if self.slot is None:
            return [slice(0, heads)]
        groups, start = [], 0
        while start < heads:
            groups.append(slice(start, min(max(1, 2 * start), heads)))
            start = groups[-1].stop
        return groups

    def pull(self, piece: Piece, heads: slice) -> list[Move | Mark]:
        """Copies of some heads of a piece of another rank's keys and values."""
        pulls: list[Move | Mark] = []
        for whole, theirs in zip(self.keys(self.call.rank), self.keys(piece.source), strict=True):
            into, source = whole[:, piece.place, heads], theirs[:, piece.start : piece.stop, heads]
            if piece.stop > piece.start and self.slot is None:
                pulls.append(Move(into.transpose(0, 1), source.transpose(0, 1)))
            elif piece.stop > piece.start:
                pulls += [Move(a.transpose(0, 1), b.transpose(0, 1)) for a, b in zip(into, source, strict=True)]
        if self.slot is not None:
            pulls.append(Mark(self.flags[piece.base // self.slot, heads]))
        return pulls

    @property
    def flags(self) -> Tensor:
        """[sources, G], in the order of the axis."""
        ranks, heads = self.call.plan.ranks, self.packed[0].shape[2]
        return self.symmetric.words[: ranks * heads].view(ranks, heads)

    def home(self, owner: int, sender: int) -> Pair:
        """Where `sender` puts its gradients of the keys of `owner`, [B, M, G, D] and [B, M, G, E]."""
        k, v = self.like
        keys, base = next((keys, base) for who, keys, base in homecomings(self.call.plan, owner) if who == sender)
        dtype, length = accumulate_dtype(k), keys.stop - keys.start
        memory = self.symmetric.region(owner, GRADIENTS)[base * token_width(k, v) * dtype.itemsize :]
        return views(memory, dtype, (k.shape[0], length, *k.shape[2:]), (v.shape[0], length, *v.shape[2:]))

    def bring(self, k: Tensor, v: Tensor) -> Callable[[], None]:
        """Shows own keys to the others, and starts to bring theirs."""
        for place, x in zip(self.packed, (k, v), strict=True):
            place.copy_(x)
        self.symmetric.meet()
        if self.slot is not None:
            self.flags[0].fill_(self.symmetric.meetings)
        return self.symmetric.copy(self.pulls)

    def send(self, dk: Tensor, dv: Tensor) -> Callable[[], None]:
        """Starts to take gradients of the others' keys to their owners."""
        return self.symmetric.copy(
            [
                Move(there[batch], dx[batch, place])
                for place, home in self.homes
                for there, dx in zip(home, (dk, dv), strict=True)
                for batch in range(dx.shape[0])
            ],
            notify=True,
        )


def map_of(call: Call, k: Tensor, v: Tensor, gradients: bool) -> Map:
    """The map for this turn."""
    symmetric = call.symmetric
    assert symmetric is not None
    name = gradients, symmetric.meetings % 2
    found = call.derived.get(name)
    if found is None or found.generation != symmetric.generation:
        slot = slot_of(call.plan) if call.schedule.flags and not gradients else None
        symmetric.reserve(region_sizes(call.plan, k, v, gradients, slot))
        found = call.derived[name] = Map(call, symmetric, k, v, gradients)
    return found


def token_width(k: Tensor, v: Tensor) -> int:
    """Numbers that a token's keys and values hold, in all sequences of the batch."""
    return k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3])


def views(memory: Tensor, dtype: torch.dtype, first: tuple[int, ...], second: tuple[int, ...]) -> Pair:
    """Two tensors one behind the other in a region."""
    flat, cut = memory.view(dtype), torch.Size(first).numel()
    return flat[:cut].view(first), flat[cut : cut + torch.Size(second).numel()].view(second)


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, running: Pair | None = None) -> Pair:
    """Attention of this rank's queries over the whole sequence; see `ring.forward`."""
    attend, scale = call.kernel.forward, call.scale
    there = map_of(call, k, v, gradients=False)
    arrived = there.bring(k, v)
    if there.slot is not None:
        symmetric = there.symmetric
        arrival = Arrival(there.flags, symmetric.meetings, there.slot, symmetric.patience, symmetric.late)
        waiting: Any = attend  # only a kernel that can is told to
        out, lse = waiting(q, *there.all, scale=scale, running=running, out_dtype=q.dtype, arrival=arrival)
        arrived()
        symmetric.confirm()
        return out, lse
    if not call.schedule.own_first:
        arrived()
        return attend(q, *there.all, scale=scale, running=running, out_dtype=q.dtype)
    own = call.plan.segments(call.rank, call.rank)
    own_dtype = None if there.others.segments else q.dtype
    running = attend(q, k, v, own, scale=scale, running=running, out_dtype=own_dtype)
    arrived()
    if not there.others.segments:
        return running
    return attend(q, *there.others, scale=scale, running=running, out_dtype=q.dtype)


def backward(
    call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's queries, keys and values; see `ring.backward`."""
    there = map_of(call, k, v, gradients=True)
    work = Backward(call, dout, q, k, v, out, lse, delta)
    arrived = there.bring(k, v)
    work.own_keys(work.first)
    arrived()
    sent = there.send(*work.differentiate(*there.others))
    work.own_keys(work.last)
    sent()
    there.symmetric.collect()
    return work.settle(there.parts)
