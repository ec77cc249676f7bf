"""From an operator's arguments to an executor and its call: ranks agree on a configuration when it is new, and what
follows from it is kept.

Tensors: q [B, L, H, D], k [B, L, G, D], v [B, L, G, E] with L this rank's tokens.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.agreement import agree
from ringattn.checks import check_inputs
from ringattn.cost import Choice, Workload, choose_executor
from ringattn.documents import Documents, documents_of
from ringattn.executors import gather, pull, ring
from ringattn.executors.call import Call, Executor
from ringattn.kernels.interface import Kernel
from ringattn.kernels.registry import choose_kernel
from ringattn.mask import Mask
from ringattn.plan import Plan, plan_of
from ringattn.ranks import Ranks, ranks_named
from ringattn.replay import with_room_for_branches
from ringattn.transport.symmetric import node
from ringattn.version import __version__

__all__ = ["EXECUTORS", "Settings", "choose", "prepare"]

EXECUTORS: dict[str, Executor] = {"ring": ring, "gather": gather, "pull": pull}
KNOWN = 64  # configurations that a group remembers, the most recent ones: each keeps a plan

logger = logging.getLogger("ringattn")


class Settings(NamedTuple):
    """What an operator is told besides tensors; equal on all ranks."""

    group: str
    layout: str
    seq_len: int | None  # None: as many tokens as here on every rank
    causal: bool
    scale: float
    kernel: str
    executor: str
    window_left: int = -1
    window_right: int = -1
    balance_left: int = -1  # what the layout "balanced" balances: how far a query sees to either side
    balance_right: int = 0
    softcap: float = 0.0
    deterministic: bool = False

    @property
    def balance(self) -> Mask:
        return Mask(window=(self.balance_left, self.balance_right))

    def plan(self, ranks: int, documents: Documents | None) -> Plan:
        assert self.seq_len is not None
        mask = Mask(self.causal, (self.window_left, self.window_right), documents)
        return plan_of(self.layout, self.seq_len, ranks, mask, self.balance)

    def choose_kernel(self, q: Tensor, k: Tensor, v: Tensor) -> Kernel:
        return choose_kernel(self.kernel, q, k, v, softcap=self.softcap, deterministic=self.deterministic).kernel


def prepare(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor | None, settings: Settings
) -> tuple[Executor, Call]:
    """Turns an operator's arguments into an executor and its call, after all ranks have agreed on them if they are
    new."""
    ranks = ranks_named(settings.group)
    ranks.calls += 1
    if settings.seq_len is None:
        settings = settings._replace(seq_len=q.shape[1] * ranks.size)
    refusal = documents = None
    try:
        documents = None if cu_seqlens is None else documents_of(cu_seqlens)
    except (ValueError, TypeError) as error:
        refusal = error
    tensors = tuple((x.shape, x.dtype, x.device) for x in (q, k, v, sinks) if x is not None)
    configuration = settings, documents and documents.digest, tensors
    known = None if refusal else ranks.agreed.pop(configuration, None)
    if known is None:
        agree_on(ranks, q, k, v, sinks, documents, settings, refusal)
        plan = settings.plan(ranks.size, documents)
        kernel = settings.choose_kernel(q, k, v)
        choice = choose(ranks, plan, q, k, v, kernel, settings.executor)
        logger.info("executor: %s", choice)
        ranks.connect(q.device, choice.executor)
        transports = ranks.transport, ranks.buffers, ranks.symmetric
        known = (
            EXECUTORS[choice.executor],
            Call(plan, ranks.rank, kernel, settings.scale, *transports, with_room_for_branches(choice.schedule)),
        )
        if len(ranks.agreed) == KNOWN:
            del ranks.agreed[next(iter(ranks.agreed))]  # the one that was not used for the longest time, on every rank
    ranks.agreed[configuration] = known
    return known


def choose(ranks: Ranks, plan: Plan, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, executor: str) -> Choice:
    """`choose_executor` for such tensors; equal on ranks that have agreed."""
    load = Workload(
        plan=plan,
        kernel=kernel.name,
        batch=q.shape[0],
        q_heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        v_head_dim=v.shape[3],
        itemsize=q.dtype.itemsize,
        same_node=ranks.same_node,
        waits=getattr(kernel, "waits", False),
        delivers=getattr(kernel, "delivers", lambda *_: False)(q, v, ranks.size - 1),
        memory=ranks.memory,
    )
    return choose_executor(executor, load)


def agree_on(
    ranks: Ranks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    documents: Documents | None,
    settings: Settings,
    refusal: Exception | None,
) -> None:
    """Checks a configuration here, and then against the other ranks'."""
    record = {}
    try:
        check_inputs(q, k, v, sinks)
        settings.plan(ranks.size, documents)
        record = {
            "version": __version__,
            "layout": settings.layout,
            "seq_len": settings.seq_len,
            "tokens": q.shape[1],
            "causal": settings.causal,
            "window_size": f"({settings.window_left}, {settings.window_right})",
            "cu_seqlens": repr(documents),
            "balance": str(settings.balance),
            "batch": q.shape[0],
            "q_heads": q.shape[2],
            "kv_heads": k.shape[2],
            "head_dim": q.shape[3],
            "v_head_dim": v.shape[3],
            "dtype": str(q.dtype),
            "device": q.device.type,
            "softmax_scale": settings.scale,
            "softcap": settings.softcap,
            "sinks": "none" if sinks is None else str(sinks.dtype),
            "deterministic": settings.deterministic,
            "kernel": settings.choose_kernel(q, k, v).name,
            "executor": settings.executor,
            "node": node(q.device),
            "memory": torch.cuda.get_device_properties(q.device).total_memory if q.is_cuda else 0,
        }
    except (ValueError, TypeError, NotImplementedError) as error:
        refusal = refusal or error
    records = agree(ranks, record, refusal)
    ranks.same_node = len({other["node"] for other in records}) == 1 and bool(record["node"])
    ranks.memory = min(int(other["memory"]) for other in records)
    held = tuple(other["tokens"] for other in records)
    layout = settings.plan(ranks.size, documents).layout
    if held != layout.lengths:
        raise ValueError(
            f"got shards of {held} tokens; layout {layout.name!r} of {layout.seq_len} tokens on {ranks.size} ranks has "
            f"{layout.lengths}: cut the sequence with ContextParallel.shard and pass its length as seq_len"
        )
