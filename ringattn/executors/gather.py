"""gather: bring all keys and values here, then compute in one launch; the least to issue, the most memory.

Where most shards are seen by most ranks they come by an all-gather, otherwise as messages of just the keys that are
looked at. With several head groups the keys of one group come while the one before is computed, and two are held.

In the backward all are gathered again, and each rank's share of the gradients goes straight to its owner while own
keys are differentiated (`home.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ringattn.executors.axis import Axis, slots, span, spans
from ringattn.executors.call import Call
from ringattn.executors.home import Backward
from ringattn.kernels.interface import Part, accumulate_dtype
from ringattn.kernels.segments import Segments
from ringattn.plan import Plan
from ringattn.transport.interface import Message, Move

__all__ = ["backward", "forward"]

Pair = tuple[Tensor, Tensor]
MOSTLY_SEEN = 0.5  # an all-gather moves everything, but faster than as many messages


def mostly_seen(plan: Plan) -> bool:
    """Whether at least half of all keys are looked at by the average other rank."""

    def build() -> bool:
        ranks = range(plan.ranks)
        spanned = (span(plan, rank, source) for rank in ranks for source in ranks if rank != source)
        return sum(stop - start for start, stop in spanned) >= MOSTLY_SEEN * plan.layout.seq_len * (plan.ranks - 1)

    return plan.derive("mostly seen", build)


def axis_of(call: Call) -> Axis:
    """Where the gathered keys lie."""
    if mostly_seen(call.plan):
        return slots(call.plan, call.rank)
    return spans(call.plan, call.rank, range(call.plan.ranks), whole=call.rank)


def bring(call: Call, k: Tensor, v: Tensor, turn: int) -> Callable[[], Pair]:
    """Starts gathering; returns the call that waits and gives k, v on the axis of `axis_of`, [B, M, G, D]."""
    if call.transport is None:
        return lambda: (k, v)
    pairs = [gathered(call, name, x, turn) for name, x in (("k", k), ("v", v))]
    axis = axis_of(call)
    if mostly_seen(call.plan):
        moves = [Move(whole.unflatten(0, (call.plan.ranks, -1)), shard) for whole, shard in pairs]
        wait = call.transport.all_gather(moves)
    else:
        wanted = [(peer, slice(*span(call.plan, peer, call.rank))) for peer in others(call)]
        sends = [Message(shard[keys], peer) for _, shard in pairs for peer, keys in wanted]
        pieces = [piece for piece in axis.pieces if piece.source != call.rank]
        receives = [Message(whole[piece.place], piece.source) for whole, _ in pairs for piece in pieces]
        for whole, shard in pairs:
            whole[axis.pieces[call.rank].place].copy_(shard)
        wait = call.transport.exchange(sends, receives)

    def arrived() -> Pair:
        wait()
        whole_k, whole_v = (whole.transpose(0, 1) for whole, _ in pairs)
        return whole_k, whole_v

    return arrived


def gathered(call: Call, name: str, x: Tensor, turn: int) -> Pair:
    """Room for all keys, [M, B, G, D], and this rank's shard as it is sent, [L, B, G, D] or as long as a slot."""
    batch, length, *heads = x.shape
    axis = axis_of(call)
    whole = call.buffers.take(("gathered", name, turn), (axis.length, batch, *heads), x, x.dtype)
    slot = axis.length // call.plan.ranks if mostly_seen(call.plan) else length
    if slot == length:
        return whole, x.transpose(0, 1).contiguous()
    shard = call.buffers.take(("shard", name, turn), (slot, batch, *heads), x, x.dtype)
    shard[:length].copy_(x.transpose(0, 1))
    shard[length:].zero_()  # a masked key is still multiplied by zero, so it must be finite
    return whole, shard


def others(call: Call) -> list[int]:
    return [peer for peer in range(call.plan.ranks) if peer != call.rank]


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, running: Pair | None = None) -> Pair:
    """Attention of this rank's queries over the whole sequence; see `ring.forward`."""
    segments = call.plan.segments(0, 0) if call.transport is None else axis_of(call).segments

    def attend(q: Tensor, keys: Pair, running: Pair | None) -> Pair:
        return call.kernel.forward(q, *keys, segments, scale=call.scale, running=running, out_dtype=q.dtype)

    groups = min(call.schedule.head_groups, k.shape[2])
    if groups == 1:
        return attend(q, bring(call, k, v, 0)(), running)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulate_dtype(q))
    parts = list(zip(k.tensor_split(groups, 2), v.tensor_split(groups, 2), strict=True))
    ratio, head = q.shape[2] // k.shape[2], 0
    coming = bring(call, *parts[0], 0)
    for number, part in enumerate(parts):
        keys = coming()
        if number + 1 < groups:
            coming = bring(call, *parts[number + 1], (number + 1) % 2)
        heads = slice(head, head + part[0].shape[2] * ratio)
        seen = running and (running[0][:, :, heads], running[1][:, heads])
        out[:, :, heads], lse[:, heads] = attend(q[:, :, heads], keys, seen)
        head = heads.stop
    return out, lse


def backward(
    call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's queries, keys and values; see `ring.backward`."""
    work = Backward(call, dout, q, k, v, out, lse, dlse)
    if call.transport is None:
        work.own_keys(work.last)
        return work.settle([])
    coming = bring(call, k, v, 0)
    work.own_keys(work.first)
    keys = coming()
    axis = axis_of(call)
    grads = work.differentiate(*keys, remote(axis, call.rank))
    parts, receives = [], []
    for peer in others(call):
        keys_seen = slice(*span(call.plan, peer, call.rank))
        room = [
            call.buffers.take((name, peer), (x.shape[0], keys_seen.stop - keys_seen.start, *x.shape[2:]), x, dx.dtype)
            for name, x, dx in (("dk", k, grads[0]), ("dv", v, grads[1]))
        ]
        parts.append(Part(keys_seen, *room))
        receives += [Message(x, peer) for x in room]
    sends = [
        Message(dx[:, piece.of(*span(call.plan, call.rank, piece.source))].contiguous(), piece.source)
        for piece in axis.pieces
        if piece.source != call.rank
        for dx in grads
    ]
    wait = call.transport.exchange(sends, receives)
    work.own_keys(work.last)
    wait()
    return work.settle(parts)


def remote(axis: Axis, rank: int) -> Segments:
    """What is seen of the other ranks' keys."""
    own = axis.pieces[rank].place

    def others(all: Segments) -> Segments:
        k_start = all.table[:, 2]
        return Segments(all.table[(k_start < own.start) | (k_start >= own.stop)])

    return axis.segments.derive(("remote", rank), others)
