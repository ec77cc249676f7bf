"""ring_attention: exact attention over a sequence that is cut across ranks, as whole-op custom operators.

The forward and the backward of the whole ring are one `torch.library` operator each, with fakes and autograd, so
`torch.compile(fullgraph=True)` does not look inside and a checkpoint policy can keep (out, lse) and never run the
ring again. Where nobody looks, the same functions run without the operators around them. cu_seqlens travels as the
tensor that it is, so that new documents do not compile anew, and becomes a plan inside.
Tensors: q [B, L, H, D], k [B, L, G, D], v [B, L, G, E] with L this rank's tokens.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from ringattn.agreement import agree
from ringattn.checks import check_inputs, refuse_unsupported
from ringattn.cost import Choice, Workload, choose_executor
from ringattn.documents import CuSeqlens, Documents, documents_of
from ringattn.executors import gather, pull, ring
from ringattn.executors.call import Call, Executor
from ringattn.kernels.interface import Kernel, accumulate_dtype
from ringattn.kernels.registry import choose_kernel
from ringattn.mask import Mask, WindowSize, make_mask
from ringattn.plan import Plan, plan_of
from ringattn.ranks import Ranks, group_name, ranks_named
from ringattn.sinks import seen_by_sinks, sink_gradients
from ringattn.transport.symmetric import node
from ringattn.version import __version__

__all__ = ["EXECUTORS", "ring_attention"]

EXECUTORS: dict[str, Executor] = {"ring": ring, "gather": gather, "pull": pull}


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

    @property
    def balance(self) -> Mask:
        return Mask(window=(self.balance_left, self.balance_right))

    def plan(self, ranks: int, documents: Documents | None) -> Plan:
        assert self.seq_len is not None
        mask = Mask(self.causal, (self.window_left, self.window_right), documents)
        return plan_of(self.layout, self.seq_len, ranks, mask, self.balance)


SETTINGS = (
    "str group, str layout, SymInt? seq_len, bool causal, float scale, str kernel, str executor, "
    "int window_left, int window_right, int balance_left, int balance_right, float softcap"
)
SHARED = f"Tensor? sinks, Tensor? cu_seqlens, {SETTINGS}"  # what the forward and the backward are both told
KNOWN = 64  # configurations that a group remembers, the most recent ones: each keeps a plan


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
        kernel = choose_kernel(settings.kernel, q, k, v, softcap=settings.softcap).kernel
        choice = choose(ranks, plan, q, k, v, kernel, settings.executor)
        logger.info("executor: %s", choice)
        ranks.connect(q.device, choice.executor)
        transports = ranks.transport, ranks.buffers, ranks.symmetric
        known = (
            EXECUTORS[choice.executor],
            Call(plan, ranks.rank, kernel, settings.scale, *transports, choice.schedule),
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
            "kernel": choose_kernel(settings.kernel, q, k, v, softcap=settings.softcap).kernel.name,
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


def run_forward(q, k, v, sinks, cu_seqlens, *settings):
    executor, call = prepare(q, k, v, sinks, cu_seqlens, Settings(*settings))
    return executor.forward(call, q, k, v, None if sinks is None else seen_by_sinks(sinks, q, v))


attention_forward = torch.library.custom_op(
    "ringattn::forward",
    run_forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {SHARED}) -> (Tensor, Tensor)",
)


@attention_forward.register_fake
def _(q, k, v, *rest):
    batch, rows, heads, _ = q.shape
    return q.new_empty(batch, rows, heads, v.shape[3]), q.new_empty((batch, heads, rows), dtype=accumulate_dtype(q))


def run_backward(dout, dlse, q, k, v, out, lse, sinks, cu_seqlens, *settings):
    executor, call = prepare(q, k, v, sinks, cu_seqlens, Settings(*settings))
    delta = call.kernel.row_delta(dout, out)
    if dlse is not None:
        if not call.kernel.reads_delta:
            raise NotImplementedError(
                f"kernel={call.kernel.name!r} cannot differentiate lse; use kernel='reference', or detach the lse"
            )
        delta -= dlse
    grads = executor.backward(call, dout, q, k, v, out, lse, delta)
    dsinks = q.new_empty(0) if sinks is None else sink_gradients(sinks, lse, delta)
    return *(grad.to(q.dtype).contiguous() for grad in grads), dsinks


attention_backward = torch.library.custom_op(
    "ringattn::backward",
    run_backward,
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{SHARED}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, sinks, *rest):
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), dsinks


def save_for_backward(ctx, inputs, output) -> None:
    q, k, v, sinks, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, cu_seqlens)
    ctx.set_materialize_grads(False)


def differentiate(ctx, dout, dlse):
    q, k, v, out, lse, sinks, cu_seqlens = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    run = attention_backward if watched(q, k, v) else run_backward
    *grads, dsinks = run(dout, dlse, q, k, v, out, lse, sinks, cu_seqlens, *ctx.settings)
    return *grads, None if sinks is None else dsinks, None, *(None for _ in ctx.settings)


attention_forward.register_autograd(differentiate, setup_context=save_for_backward)


class Attention(torch.autograd.Function):
    """The operators without torch's dispatch to Python, which costs more than the launches of a short sequence."""

    forward = staticmethod(run_forward)
    setup_context = staticmethod(save_for_backward)
    backward = staticmethod(once_differentiable(differentiate))  # pyright: ignore[reportAssignmentType]


def watched(*tensors: Tensor) -> bool:
    """Whether somebody must see operators: a compiler, a checkpoint policy, a transform, a tensor of another kind."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)
    )


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    layout: str = "zigzag",
    causal: bool = False,
    window_size: WindowSize = None,
    cu_seqlens: CuSeqlens | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    softmax_scale: float | None = None,
    seq_len: int | None = None,
    balance: Mask | None = None,
    kernel: str = "auto",
    executor: str = "auto",
    return_lse: bool = False,
    **unsupported: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys and values of all ranks. Collective; differentiable.

    Equal to `softmax(softmax_scale * Q K^T, masked) V` on the whole sequence (Ring Attention, arXiv:2310.01889).

    Args:
        q (Tensor): [B, L, H, D] this rank's queries; fp16, bf16, fp32 or fp64.
        k (Tensor): [B, L, G, D] its keys; H is a multiple of G (grouped-query attention).
        v (Tensor): [B, L, G, E] its values.
        group: the ranks that share the sequence: a ProcessGroup, a 1-D DeviceMesh, or None for all ranks (this
            process alone where torch.distributed is not initialised).
        layout: which rank holds which token: "contiguous", "zigzag", "striped" or "balanced"; see
            `ContextParallel.shard`.
        causal: a query sees keys at its own global position and before.
        window_size: (left, right) as in flash-attn: a query sees that many keys before and after its own position,
            -1 for no limit. With causal, one number n is short for (n - 1, 0): the last n keys, its own among them.
        cu_seqlens: cumulative lengths of the documents packed into the whole sequence (not this rank's part), as in
            flash-attn's varlen functions: integers that begin with 0. Tokens see their own document only; those after
            the last one are padding, which sees nothing. Holds for every row of the batch. Pass the same tensor to
            every layer: it is read, and if it is on a GPU waited for, once.
        sinks (Tensor): [H] a learnt logit per head that takes its share of every softmax and gives nothing
            (StreamingLLM, arXiv:2309.17453; GPT-OSS). Its gradient is this rank's part: sum it over the ranks, as that
            of any weight.
        softcap: scores become softcap * tanh(score / softcap), as in flash-attn and Gemma 2; 0 or None for no cap.
        softmax_scale: factor on the scores, before a cap; D ** -0.5 unless given.
        seq_len: tokens of the whole sequence; L * ranks unless given, so needed where it does not divide.
        balance: what the layout "balanced" balances: a causality and a window; causal unless given. See
            `ContextParallel`.
        kernel: "auto", or a name of `ringattn.kernels.registry.KERNELS`; a name never falls back to another.
        executor: "ring", "gather" or "pull", or "auto" for the one that `ringattn.cost` predicts to be fastest.
        return_lse: return (out, lse).

    Returns:
        out [B, L, H, E] in the dtype of q; with `return_lse` also lse [B, H, L], natural log, fp32 (fp64 for fp64
        inputs), sinks included. A query that sees nothing has out 0 and lse -inf, or its sink.

    Raises:
        ValueError, TypeError: shapes, dtypes or names that do not fit.
        NotImplementedError: an option or an input that is not computed.
        RankDisagreement: ranks called with different configurations; raised on every rank.
        TransportError: a rank did not answer in time.
    """
    refuse_unsupported(unsupported)
    if executor not in ("auto", *EXECUTORS):
        raise ValueError(f"got executor={executor!r}; choose one of {', '.join(('auto', *EXECUTORS))}")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    cap = float(softcap or 0.0)
    if not 0.0 <= cap < math.inf:
        raise ValueError(f"got softcap={softcap}; pass a positive number, or 0 for no cap")
    if isinstance(cu_seqlens, Documents):
        cu_seqlens = cu_seqlens.tensor
    elif cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
        cu_seqlens = torch.as_tensor(cu_seqlens)
    windows = (*make_mask(causal, window_size).window, *(balance or Mask(causal=True)).window)
    settings = Settings(group_name(group), layout, seq_len, causal, scale, kernel, executor, *windows, cap)
    tensors = (q, k, v, sinks, cu_seqlens)
    attend = attention_forward if watched(*(x for x in tensors if x is not None)) else Attention.apply
    out, lse = attend(*tensors, *settings)
    return (out, lse) if return_lse else out
