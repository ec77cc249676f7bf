"""Attention across ranks as each implementation's users call it, ours first; the peers are in peers.py.

Inputs are cut beforehand, in the layout that the implementation wants, so no figure holds a cut that its users would
pay once per batch. `attend` is differentiable, and collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

import ringattn
from ringattn.attention import EXECUTORS
from ringattn.executors.call import Buffers
from ringattn.kernels.registry import KERNELS
from ringattn.kernels.segments import Segments
from ringattn.layout import LAYOUTS
from ringattn.plan import Plan, make_plan
from ringattn.ranks import group_name, ranks_named

from ..oracle import Case, Inputs
from .implementations import Ours

__all__ = ["Across", "Local", "OursAcross", "Share", "cut", "gathered_segments", "ours_across"]


class Local(NamedTuple):
    """What one rank computes if nothing has to be communicated: its queries with all keys, or its heads."""

    kernel: str
    layout: str | None  # None: a share of the heads over the whole sequence


class Across:
    """One way to compute attention across ranks. Instances travel to processes, so they hold names only."""

    name: str
    layout: str  # how its users cut a sequence
    kernel: str  # what computes on each rank, by its name in `ringattn.kernels.registry`
    heads_first = False  # takes and gives [B, H, L, D] instead of [B, L, H, D]

    @property
    def local(self) -> Local:
        return Local(self.kernel, self.layout)

    def refuses(self, x: Inputs, case: Case, ranks: int) -> str | None:
        """Why it cannot compute such a case here, or None if it can; `x` is the whole sequence."""
        refusal = KERNELS[self.kernel].refuses(x.q, x.k, x.v)
        return refusal and f"its kernel {self.kernel}: {refusal}"

    @contextmanager
    def ready(self, case: Case, device: torch.device) -> Iterator[None]:
        """Surrounds everything that is done with it; what it set up or kept is gone afterwards."""
        yield

    def attend(self, q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
        raise NotImplementedError


class OursAcross(Across):
    """`ringattn.ContextParallel` as its users hold it."""

    def __init__(self, kernel: str, executor: str, layout: str):
        self.kernel, self.executor, self.layout = kernel, executor, layout
        self.name = f"ringattn-{kernel}-{executor}-{layout}"

    @contextmanager
    def ready(self, case: Case, device: torch.device) -> Iterator[None]:
        self.cp = ringattn.ContextParallel(None, layout=self.layout, kernel=self.kernel, executor=self.executor)
        yield
        ranks_named(group_name(None)).buffers = Buffers()  # they are kept between calls, and count as memory

    def attend(self, q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
        return self.cp.attention(q, k, v, causal=case.causal, seq_len=case.seq_len)


def ours_across() -> list[Across]:
    """Every kernel, executor and layout."""
    return [OursAcross(kernel, executor, layout) for kernel in KERNELS for executor in EXECUTORS for layout in LAYOUTS]


def gathered_segments(plan: Plan, rank: int) -> Segments:
    """What a rank sees of all keys, laid end to end in rank order."""
    return plan.gathered_segments(rank)


class Share(Ours):
    """One rank's queries with the keys of all ranks, in one call of a kernel."""

    def __init__(self, local: Local, rank: int, ranks: int):
        super().__init__(local.kernel)
        self.layout, self.rank, self.ranks = local.layout, rank, ranks

    def plan(self, case: Case) -> Plan:
        assert self.layout is not None
        return make_plan(self.layout, case.seq_len, self.ranks, causal=case.causal)

    def segments(self, case: Case) -> Segments:
        return gathered_segments(self.plan(case), self.rank)

    def prepare(self, x: Inputs) -> Inputs:
        """Only the queries are cut. Which keys stand where makes no difference to the time."""
        assert self.layout is not None
        layout = ringattn.make_layout(self.layout, x.q.shape[1], self.ranks)
        return Inputs(layout.shard(x.q, self.rank, 1), x.k, x.v, layout.shard(x.dout, self.rank, 1))


def cut(each: Across, x: Inputs, rank: int, ranks: int) -> Inputs:
    """One rank's part of the whole sequence, as the users of an implementation hold it."""
    layout = ringattn.make_layout(each.layout, x.q.shape[1], ranks)
    parts = (layout.shard(tensor, rank, 1) for tensor in x)
    return Inputs(*(part.transpose(1, 2).contiguous() if each.heads_first else part for part in parts))
