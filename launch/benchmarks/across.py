"""Attention across ranks as each implementation's users call it, ours first; the peers are in peers.py.

Inputs are cut beforehand, in the layout that the implementation wants, so no figure holds a cut that its users would
pay once per batch. `attend` is differentiable, and collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ringattn
from ringattn.kernels.registry import KERNELS
from ringattn.kernels.segments import Segments
from ringattn.layout import LAYOUTS, Layout
from ringattn.plan import Plan, make_plan
from ringattn.preparation import EXECUTORS, choose
from ringattn.ranks import group_name, ranks_named
from ringattn.transport.symmetric import node

from ..oracle import Case, Inputs
from .implementations import Ours
from .local import other_mask

__all__ = [
    "NAMED_EXECUTORS",
    "Across",
    "Local",
    "OursAcross",
    "Share",
    "busiest",
    "cut",
    "ours_across",
]


class Local(NamedTuple):
    """What one rank computes if nothing has to be communicated: its queries with all keys, or its heads."""

    kernel: str
    layout: str | None  # None: a share of the heads over the whole sequence


class Across:
    """One way to compute attention across ranks. Instances travel to processes, so they hold names only."""

    name: str
    layout: str  # how its users cut a sequence
    kernel: str  # what computes on each rank, by its name in `ringattn.kernels.registry` if it can be called alone
    heads_first = False  # takes and gives [B, H, L, D], views of [B, L, H, D]

    @property
    def local(self) -> Local:
        return Local(self.kernel, self.layout)

    def arrange(self, case: Case, ranks: int) -> Layout:
        """Which rank holds which token; some layouts depend on the mask."""
        return make_plan(self.layout, case.seq_len, ranks, **case.mask).layout

    any_mask = False  # takes windows and documents, too

    def refuses(self, x: Inputs, case: Case, ranks: int) -> str | None:
        """Why it cannot compute such a case here, or None if it can; `x` is an empty sequence."""
        refusal = KERNELS[self.kernel].refuses(x.q, x.k, x.v)
        if refusal is not None:
            return f"its kernel {self.kernel}: {refusal}"
        return None if self.any_mask else other_mask(case)

    @contextmanager
    def ready(self, case: Case, device: torch.device) -> Iterator[None]:
        """Surrounds everything that is done with it; what it set up or kept is gone afterwards."""
        yield

    def attend(self, q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
        raise NotImplementedError

    def held(self) -> int:
        """Bytes that it keeps on this GPU and torch's allocator knows nothing of."""
        return 0

    def expects(self, x: Inputs, case: Case, which: str) -> dict[str, Any]:
        """What it says of itself, in fields of a record: how it goes about it, and how long and how much
        memory for the others' keys and gradients it thinks that it takes."""
        return {"executor": None, "predicted_ms": None, "predicted_gib": None}


class OursAcross(Across):
    """`ringattn.ContextParallel` as its users hold it."""

    any_mask = True

    def __init__(self, kernel: str, executor: str, layout: str):
        self.kernel, self.executor, self.layout = kernel, executor, layout
        self.name = f"ringattn-{kernel}-{executor}-{layout}"

    def refuses(self, x: Inputs, case: Case, ranks: int) -> str | None:
        if self.executor == "pull" and ranks > 1 and not node(x.q.device):
            return "its executor pull: GPUs do not reach each other's memory here"
        return super().refuses(x, case, ranks)

    @contextmanager
    def ready(self, case: Case, device: torch.device) -> Iterator[None]:
        self.cp = ringattn.ContextParallel(None, layout=self.layout, kernel=self.kernel, executor=self.executor)
        self.options = case.mask
        if case.documents is not None:
            self.options["cu_seqlens"] = torch.tensor(case.documents, dtype=torch.int32)
        yield
        ranks = ranks_named(group_name(None))
        ranks.buffers.clear()  # they are kept between calls, and count as memory
        ranks.agreed.clear()  # so are configurations, and what they refer to
        if ranks.symmetric is not None:
            ranks.symmetric.release()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
        return self.cp.attention(q, k, v, seq_len=case.seq_len, **self.options)

    def held(self) -> int:
        symmetric = ranks_named(group_name(None)).symmetric
        return 0 if symmetric is None else symmetric.nbytes

    def expects(self, x: Inputs, case: Case, which: str) -> dict[str, Any]:
        ranks = ranks_named(group_name(None))
        plan = make_plan(self.layout, case.seq_len, ranks.size, **case.mask)
        choice = choose(ranks, plan, x.q, x.k, x.v, KERNELS[self.kernel], self.executor)
        chosen = choice.executor, choice.schedule
        own = next((each for each in choice.predictions if (each.executor, each.schedule) == chosen), None)
        seconds = own and (own.forward if which == "forward" else own.total)
        memory = own and own.memory / 2**30  # besides its own inputs and results
        return {"executor": choice.executor, "predicted_ms": seconds and 1e3 * seconds, "predicted_gib": memory}


NAMED_EXECUTORS = (*EXECUTORS, "auto") if len(EXECUTORS) > 1 else tuple(EXECUTORS)  # where there is a choice, its too


def ours_across() -> list[Across]:
    """Every kernel, executor and layout."""
    return [OursAcross(*way) for way in product(KERNELS, NAMED_EXECUTORS, LAYOUTS)]


def busiest(local: Local, case: Case, ranks: int) -> float:
    """The busiest rank's share of all pairs."""
    if local.layout is None:
        return 1 / ranks
    return 1 / (ranks * make_plan(local.layout, case.seq_len, ranks, **case.mask).balance)


class Share(Ours):
    """One rank's queries with the keys of all ranks, in one call of a kernel."""

    def __init__(self, local: Local, rank: int, ranks: int):
        super().__init__(local.kernel)
        self.layout, self.rank, self.ranks = local.layout, rank, ranks

    def plan(self, case: Case) -> Plan:
        assert self.layout is not None
        return make_plan(self.layout, case.seq_len, self.ranks, **case.mask)

    def segments(self, case: Case) -> Segments:
        return self.plan(case).gathered_segments(self.rank)

    def prepare(self, x: Inputs, case: Case) -> Inputs:
        """Only the queries are cut. Which keys stand where makes no difference to the time."""
        layout = self.plan(case).layout
        return Inputs(layout.shard(x.q, self.rank, 1), x.k, x.v, layout.shard(x.dout, self.rank, 1))


def cut(each: Across, x: Inputs, case: Case, rank: int, ranks: int) -> Inputs:
    """One rank's part of the whole sequence, as the users of an implementation hold it."""
    layout = each.arrange(case, ranks)
    parts = (layout.shard(tensor, rank, 1) for tensor in x)
    return Inputs(*(part.transpose(1, 2) if each.heads_first else part for part in parts))
