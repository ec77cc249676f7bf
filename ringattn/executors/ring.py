"""The ring: at step t, rank r computes with the keys and values of rank r - t while the next ones arrive.

    forward, P = 3             step 0           step 1           step 2
      rank 0  computes with     KV 0             KV 2             KV 1
              while sending     KV 0 -> rank 1   KV 2 -> rank 1

    backward: KV goes round as before, and the gradients of each shard, in fp32, follow it one step behind, gathering
    the other ranks' parts, until the last one sends them home. Own keys are cut in two, so that the first and the last
    hop hide as well (`home.py`).

      rank 0  computes          half of dKV 0    dKV 2            dKV 1                      the rest of dKV 0
              while sending     KV 0 -> rank 1   KV 2 -> rank 1   dKV 2 -> rank 1            dKV 1 -> rank 1, its owner
              then adds                          dKV 2            dKV 1 <- rank 2, and own   dKV 0 <- rank 2, and own

Memory is two buffers of the largest shard for KV, two for dKV and one for what comes home, whatever P. A shard travels
no further than the last rank that looks at it (`Plan.reach`), and of it only what is looked at from there on
(`Plan.cargo`): a window costs messages of its own length. Every sum has a fixed order, so results are bit-equal
run to run. Source: Ring Attention, arXiv:2310.01889.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn.executors.axis import within
from ringattn.executors.call import Call, with_room
from ringattn.executors.home import Backward
from ringattn.kernels.interface import Part, accumulate_dtype, nothing_seen
from ringattn.kernels.segments import Segments
from ringattn.plan import Plan
from ringattn.transport.interface import Message

__all__ = ["backward", "forward"]

Pair = tuple[Tensor, Tensor]


class Neighbours:
    """The ring as one rank sees it: whose shard it holds at a step, how much of it, and what then goes where."""

    def __init__(self, call: Call, k: Tensor, v: Tensor):
        self.call = call
        self.ranks = call.plan.ranks
        self.next = (call.rank + 1) % self.ranks
        self.previous = (call.rank - 1) % self.ranks
        self.k, self.v = k, v

    def source(self, step: int) -> int:
        return (self.call.rank - step) % self.ranks

    def held(self, step: int) -> slice:
        """The keys of a step's shard that are here: those that this rank or one further on looks at."""
        if step % self.ranks == 0:
            return slice(0, self.k.shape[1])
        return self.call.plan.cargo(self.source(step), step)

    def segments(self, step: int) -> Segments:
        """What this rank's queries see of the keys that are here."""
        seen, held = self.call.plan.segments(self.call.rank, self.source(step)), self.held(step)
        return seen if held.start == 0 else within(seen, held.start, held.stop)

    def buffer(self, name: str, step: int, keys: slice, dtype: torch.dtype) -> Pair:
        """One of two pairs of buffers for some keys and values."""
        k, v = (
            self.call.buffers.take((name, part, step % 2), (x.shape[0], keys.stop - keys.start, *x.shape[2:]), x, dtype)
            for part, x in (("k", self.k), ("v", self.v))
        )
        return k, v

    def pass_shard(self, step: int, shard: Pair | None) -> tuple[list[Message], list[Message], Pair | None]:
        """Sends on what someone further needs of this step's shard, and receives the next step's."""
        plan = self.call.plan
        sends, receives, arriving = [], [], None
        if shard is not None and step < plan.reach(self.source(step)):
            held, wanted = self.held(step), plan.cargo(self.source(step), step + 1)
            keys = slice(wanted.start - held.start, wanted.stop - held.start)
            sends = [Message(x[:, keys].contiguous(), self.next) for x in shard]
        upcoming = self.source(step + 1)
        if step + 1 <= plan.reach(upcoming) and step + 1 < self.ranks:
            arriving = self.buffer("shard", step, self.held(step + 1), self.k.dtype)
            receives = [Message(x, self.previous) for x in arriving]
        return sends, receives, arriving

    def exchange(self, sends: list[Message], receives: list[Message], *, narrow: bool = False):
        if not (sends or receives):
            return lambda: None
        assert self.call.transport is not None
        return self.call.transport.exchange(sends, receives, narrow=narrow)


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, running: Pair | None = None) -> Pair:
    """Attention of this rank's queries over the whole sequence.

    Args:
        q (Tensor): [B, L, H, D] this rank's queries; k [B, L, G, D], v [B, L, G, E] its keys and values.
        running: (out, lse) that rows start from, in the accumulate dtype; may be written to.

    Returns:
        out [B, L, H, E] in the dtype of q, lse [B, H, L] in fp32 (fp64 for fp64 inputs).
    """
    plan, rank = call.plan, call.rank
    ring = Neighbours(call, k, v)
    seeing = [step for step in range(plan.ranks) if plan.segments(rank, ring.source(step))]
    shard: Pair | None = (k.contiguous(), v.contiguous())
    for step in range(plan.ranks):
        sends, receives, arriving = ring.pass_shard(step, shard)
        room = with_room(call) if sends or receives else {}
        wait = ring.exchange(sends, receives, narrow=bool(room))
        if step in seeing:
            assert shard is not None
            running = call.kernel.forward(
                q,
                *shard,
                ring.segments(step),
                scale=call.scale,
                running=running,
                out_dtype=q.dtype if step == seeing[-1] else None,
                **room,
            )
        wait()
        shard = arriving
    out, lse = running or nothing_seen(q, v)
    return out.to(q.dtype), lse


def first_hop(plan: Plan, source: int) -> int:
    """How many hops a shard of keys has gone when another rank first looks at it; the number of ranks if none does."""
    hops = (hop for hop in range(1, plan.ranks) if plan.work[(source + hop) % plan.ranks, source])
    return plan.derive(("first hop", source), lambda: next(hops, plan.ranks))


def backward(
    call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's queries, keys and values.

    Args:
        dout, out (Tensor): [B, L, H, E]; lse and its gradient, if it has one, [B, H, L]; the rest as in `forward`.

    Returns:
        dq, dk, dv like q, k, v, contiguous.
    """
    plan, rank = call.plan, call.rank
    ring = Neighbours(call, k, v)
    work = Backward(call, dout, q, k, v, out, lse, dlse)
    dtype = accumulate_dtype(q)
    shard: Pair | None = (k.contiguous(), v.contiguous())
    gathered: Pair | None = None  # gradients of the shard of the step before, all ranks so far but its owner
    parts: list[Part] = []
    for step in range(plan.ranks + 1):  # the extra step brings the last gradients home
        source, behind = ring.source(step), ring.source(step - 1)
        sends, receives, arriving = ring.pass_shard(step, shard)
        joining: Pair | None = None  # gradients of this step's shard, all ranks before this one
        if gathered is not None:
            peer = ring.next if step <= plan.reach(behind) else behind
            sends += [Message(x, peer) for x in gathered]
        if step < plan.ranks and first_hop(plan, source) < step <= plan.reach(source):
            joining = ring.buffer("gradient", step, plan.cargo(source, 1), dtype)
            receives += [Message(x, ring.previous) for x in joining]
        if 0 < plan.reach(rank) == step - 1:
            home = ring.buffer("home", 0, plan.cargo(rank, 1), dtype)
            parts = [Part(plan.cargo(rank, 1), *home)]
            receives += [Message(x, (rank + step - 1) % plan.ranks) for x in home]
        wait = ring.exchange(sends, receives)
        part: Pair | None = None
        if step in (0, plan.ranks):
            work.own_keys(work.last if step else work.first)
        elif plan.segments(rank, source):
            assert shard is not None
            part = work.differentiate(*shard, ring.segments(step))
        wait()
        shard = arriving
        if part is not None and joining is not None:
            begin = ring.held(step).start - plan.cargo(source, 1).start  # gradients go round whole
            for total, fresh in zip(joining, part, strict=True):
                total[:, begin : begin + fresh.shape[1]].add_(fresh)
            gathered = joining
        else:
            gathered = part or joining
    return work.settle(parts)
