"""pull: copy engines bring keys and values from the other ranks' memory, and take gradients there; no SM is spent.

    forward     compute  | pack | meet | own keys          | others' keys, merged in the epilogue |
                engines                | keys come >>>>>>> |

    backward    compute  | pack | meet | own, later half | others' keys | own, earlier half | collect | sum |
                engines                | keys come >>>>> |              | gradients go home |

Of every shard only the keys that this rank's queries look at are brought, end to end on one axis (`axis.spans`). Ranks
wait for each other in `meet` and `collect` only, on the GPU and with a deadline. Two regions of memory are used in
turn, so that no rank waits until its keys have been read (`transport.interface.Symmetric`); a third one receives
gradients. On a short sequence everything is one launch behind the copies, with own keys in front of the others'.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ringattn.executors.axis import Axis, span, spans
from ringattn.executors.call import Call
from ringattn.executors.home import Backward, Part
from ringattn.kernels.interface import accumulate_dtype
from ringattn.plan import Plan
from ringattn.transport.interface import Move, Symmetric

__all__ = ["backward", "forward", "region_sizes"]

Pair = tuple[Tensor, Tensor]
GRADIENTS = 2  # the region after the two for keys


def arrivals(plan: Plan, rank: int) -> list[int]:
    """The other ranks, nearest first, so that not all pull from the same one at once."""
    return [(rank + step) % plan.ranks for step in range(1, plan.ranks)]


def axis_of(plan: Plan, rank: int) -> Axis:
    """This rank's own keys, which the others read at that place, and behind them what it brings from the others."""
    return spans(plan, rank, [rank, *arrivals(plan, rank)], whole=rank)


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


def region_sizes(plan: Plan, k: Tensor, v: Tensor, gradients: bool) -> tuple[int, int, int]:
    """Bytes of each region, the same on all ranks: the longest axis, twice, and the most gradients."""

    def build() -> tuple[int, int]:
        ranks = range(plan.ranks)
        keys = max(axis_of(plan, rank).length for rank in ranks)
        home = max(sum(keys.stop - keys.start for _, keys, _ in homecomings(plan, rank)) for rank in ranks)
        return keys, home

    keys, home = plan.derive("regions", build)
    width = token_width(k, v)
    nbytes, home_bytes = (
        -(-n * width * itemsize // 256) * 256
        for n, itemsize in ((keys, k.element_size()), (home * gradients, accumulate_dtype(k).itemsize))
    )
    return nbytes, nbytes, home_bytes


class Keys:
    """Keys and values of one call in symmetric memory: [M, B, G, D] and [M, B, G, E], one behind the other."""

    def __init__(self, call: Call, k: Tensor, v: Tensor, gradients: bool):
        assert call.symmetric is not None
        self.call = call
        self.symmetric: Symmetric = call.symmetric
        self.symmetric.reserve(region_sizes(call.plan, k, v, gradients))
        self.turn = self.symmetric.meetings % 2
        self.like = k, v
        self.length = k.shape[1]

    def of(self, rank: int) -> Pair:
        """A rank's axis."""
        length = axis_of(self.call.plan, rank).length
        k, v = views(self.symmetric.region(rank, self.turn), self.like[0].dtype, *(shape(x, length) for x in self.like))
        return k, v

    def bring(self) -> Callable[[], None]:
        """Shows own keys to the others, and starts to bring theirs."""
        mine = self.of(self.call.rank)
        for whole, x in zip(mine, self.like, strict=True):
            whole[: self.length].copy_(x.transpose(0, 1))
        self.symmetric.meet()
        pieces = axis_of(self.call.plan, self.call.rank).pieces[1:]
        return self.symmetric.copy(
            [
                Move(whole[piece.place], theirs[piece.start : piece.stop])
                for piece in pieces
                if piece.stop > piece.start
                for whole, theirs in zip(mine, self.of(piece.source), strict=True)
            ]
        )

    @property
    def all(self) -> Pair:
        """Own keys and the others', [B, M, G, D] and [B, M, G, E]."""
        k, v = self.of(self.call.rank)
        return k.transpose(0, 1), v.transpose(0, 1)

    @property
    def others(self) -> Pair:
        """The others' only."""
        k, v = self.of(self.call.rank)
        return k[self.length :].transpose(0, 1), v[self.length :].transpose(0, 1)


def shape(x: Tensor, length: int) -> tuple[int, ...]:
    return length, x.shape[0], *x.shape[2:]


def token_width(k: Tensor, v: Tensor) -> int:
    """Numbers that a token's keys and values hold, in all sequences of the batch."""
    return k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3])


def views(memory: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Tensors one behind the other in a region."""
    flat, found, start = memory.view(dtype), [], 0
    for size in map(torch.Size, shapes):
        found.append(flat[start : start + size.numel()].view(size))
        start += size.numel()
    return tuple(found)


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """Attention of this rank's queries over the whole sequence; see `ring.forward`."""
    plan, rank = call.plan, call.rank
    keys = Keys(call, k, v, gradients=False)
    arrived = keys.bring()
    segments = remote_axis(plan, rank).segments
    if not call.schedule.own_first:
        arrived()
        segments = axis_of(plan, rank).segments
        return call.kernel.forward(q, *keys.all, segments, scale=call.scale, out_dtype=q.dtype)
    out_dtype = None if segments else q.dtype
    running = call.kernel.forward(q, k, v, plan.segments(rank, rank), scale=call.scale, out_dtype=out_dtype)
    arrived()
    if not segments:
        return running
    return call.kernel.forward(q, *keys.others, segments, scale=call.scale, running=running, out_dtype=q.dtype)


def backward(
    call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's queries, keys and values; see `ring.backward`."""
    plan, rank = call.plan, call.rank
    keys = Keys(call, k, v, gradients=True)
    work = Backward(call, dout, q, k, v, out, lse, delta)
    arrived = keys.bring()
    work.own_keys(work.first)
    arrived()
    axis = remote_axis(plan, rank)
    grads = work.differentiate(*keys.others, axis.segments)
    sent = keys.symmetric.copy(
        [
            Move(there[batch], dx[batch, piece.place])
            for piece in axis.pieces
            if piece.stop > piece.start
            for there, dx in zip(home(keys, piece.source, rank), grads, strict=True)
            for batch in range(k.shape[0])
        ],
        notify=True,
    )
    work.own_keys(work.last)
    sent()
    keys.symmetric.collect()
    senders = homecomings(plan, rank)
    return work.settle([Part(mine, *home(keys, rank, sender)) for sender, mine, _ in senders])


def home(keys: Keys, owner: int, sender: int) -> Pair:
    """Where `sender` puts its gradients of the keys of `owner`, [B, M, G, D] and [B, M, G, E]."""
    k, v = keys.like
    mine, base = next((mine, base) for who, mine, base in homecomings(keys.call.plan, owner) if who == sender)
    dtype = accumulate_dtype(k)
    memory = keys.symmetric.region(owner, GRADIENTS)[base * token_width(k, v) * dtype.itemsize :]
    dk, dv = views(memory, dtype, *((x.shape[0], mine.stop - mine.start, *x.shape[2:]) for x in keys.like))
    return dk, dv
