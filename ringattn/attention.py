"""ring_attention: exact attention over a sequence that is cut across ranks, as whole-op custom operators.

The forward and the backward of the whole ring are one `torch.library` operator each, with fakes and autograd, so
`torch.compile(fullgraph=True)` does not look inside and a checkpoint policy can keep (out, lse) and never run the
ring again. Where nobody looks, the same functions run without the operators around them.
Tensors: q [B, L, H, D], k [B, L, G, D], v [B, L, G, E] with L this rank's tokens.
"""

from __future__ import annotations

import logging
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
from ringattn.executors import gather, pull, ring
from ringattn.executors.call import Call, Executor
from ringattn.kernels.interface import accumulate_dtype
from ringattn.kernels.registry import choose_kernel
from ringattn.layout import make_layout
from ringattn.plan import Plan, make_plan
from ringattn.ranks import Ranks, group_name, ranks_named
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


SCHEMA = "str group, str layout, SymInt? seq_len, bool causal, float scale, str kernel, str executor"


def prepare(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> tuple[Executor, Call]:
    """Turns an operator's arguments into an executor and its call, after all ranks have agreed on them if they are
    new."""
    ranks = ranks_named(settings.group)
    ranks.calls += 1
    if settings.seq_len is None:
        settings = settings._replace(seq_len=q.shape[1] * ranks.size)
    configuration = settings, tuple((x.shape, x.dtype, x.device) for x in (q, k, v))
    if configuration not in ranks.agreed:
        agree_on(ranks, q, k, v, settings)
        plan = make_plan(settings.layout, settings.seq_len, ranks.size, causal=settings.causal)
        choice = choose(ranks, plan, q, k, v, settings.kernel, settings.executor)
        logger.info("executor: %s", choice)
        ranks.connect(q.device, choice.executor)
        kernel = choose_kernel(settings.kernel, q, k, v).kernel
        transports = ranks.transport, ranks.buffers, ranks.symmetric
        call = Call(plan, ranks.rank, kernel, settings.scale, *transports, choice.schedule)
        ranks.agreed[configuration] = EXECUTORS[choice.executor], call
    return ranks.agreed[configuration]


def choose(ranks: Ranks, plan: Plan, q: Tensor, k: Tensor, v: Tensor, kernel: str, executor: str) -> Choice:
    """`choose_executor` for such tensors; equal on ranks that have agreed."""
    local = choose_kernel(kernel, q, k, v).kernel
    load = Workload(
        plan=plan,
        kernel=local.name,
        batch=q.shape[0],
        q_heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        v_head_dim=v.shape[3],
        itemsize=q.dtype.itemsize,
        same_node=ranks.same_node,
        waits=getattr(local, "waits", False),
        memory=ranks.memory,
    )
    return choose_executor(executor, load)


def agree_on(ranks: Ranks, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> None:
    """Checks a configuration here, and then against the other ranks'."""
    refusal, record = None, {}
    try:
        check_inputs(q, k, v)
        make_layout(settings.layout, settings.seq_len, ranks.size)
        record = {
            "version": __version__,
            "layout": settings.layout,
            "seq_len": settings.seq_len,
            "tokens": q.shape[1],
            "causal": settings.causal,
            "batch": q.shape[0],
            "q_heads": q.shape[2],
            "kv_heads": k.shape[2],
            "head_dim": q.shape[3],
            "v_head_dim": v.shape[3],
            "dtype": str(q.dtype),
            "device": q.device.type,
            "softmax_scale": settings.scale,
            "kernel": choose_kernel(settings.kernel, q, k, v).kernel.name,
            "executor": settings.executor,
            "node": node(q.device),
            "memory": torch.cuda.get_device_properties(q.device).total_memory if q.is_cuda else 0,
        }
    except (ValueError, TypeError, NotImplementedError) as error:
        refusal = error
    records = agree(ranks, record, refusal)
    ranks.same_node = len({other["node"] for other in records}) == 1 and bool(record["node"])
    ranks.memory = min(int(other["memory"]) for other in records)
    held = tuple(other["tokens"] for other in records)
    layout = make_layout(settings.layout, settings.seq_len, ranks.size)
    if held != layout.lengths:
        raise ValueError(
            f"got shards of {held} tokens; layout {layout.name!r} of {layout.seq_len} tokens on {ranks.size} ranks has "
            f"{layout.lengths}: cut the sequence with ContextParallel.shard and pass its length as seq_len"
        )


def run_forward(q, k, v, *settings):
    executor, call = prepare(q, k, v, Settings(*settings))
    return executor.forward(call, q, k, v)


attention_forward = torch.library.custom_op(
    "ringattn::forward",
    run_forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)",
)


@attention_forward.register_fake
def _(q, k, v, *settings):
    batch, rows, heads, _ = q.shape
    return q.new_empty(batch, rows, heads, v.shape[3]), q.new_empty((batch, heads, rows), dtype=accumulate_dtype(q))


def run_backward(dout, dlse, q, k, v, out, lse, *settings):
    executor, call = prepare(q, k, v, Settings(*settings))
    delta = call.kernel.row_delta(dout, out)
    if dlse is not None:
        if not call.kernel.reads_delta:
            raise NotImplementedError(
                f"kernel={call.kernel.name!r} cannot differentiate lse; use kernel='reference', or detach the lse"
            )
        delta -= dlse
    grads = executor.backward(call, dout, q, k, v, out, lse, delta)
    return tuple(grad.to(q.dtype).contiguous() for grad in grads)


attention_backward = torch.library.custom_op(
    "ringattn::backward",
    run_backward,
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{SCHEMA}) -> (Tensor, Tensor, Tensor)",
)


@attention_backward.register_fake
def _(dout, dlse, q, k, v, *rest):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def save_for_backward(ctx, inputs, output) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def differentiate(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    run = attention_backward if watched(q, k, v) else run_backward
    return *run(dout, dlse, q, k, v, out, lse, *ctx.settings), *(None for _ in ctx.settings)


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
    softmax_scale: float | None = None,
    seq_len: int | None = None,
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
        layout: which rank holds which token: "contiguous", "zigzag" or "striped"; see `ContextParallel.shard`.
        causal: a query sees keys at its own global position and before.
        softmax_scale: factor on the scores; D ** -0.5 unless given.
        seq_len: tokens of the whole sequence; L * ranks unless given, so needed where it does not divide.
        kernel: "auto", or a name of `ringattn.kernels.registry.KERNELS`; a name never falls back to another.
        executor: "ring", "gather" or "pull", or "auto" for the one that `ringattn.cost` predicts to be fastest.
        return_lse: return (out, lse).

    Returns:
        out [B, L, H, E] in the dtype of q; with `return_lse` also lse [B, H, L], natural log, fp32 (fp64 for fp64
        inputs). A query that sees nothing has out 0 and lse -inf.

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
    settings = Settings(group_name(group), layout, seq_len, causal, scale, kernel, executor)
    attend = attention_forward if watched(q, k, v) else Attention.apply
    out, lse = attend(q, k, v, *settings)
    return (out, lse) if return_lse else out
