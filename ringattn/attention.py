"""ring_attention: exact attention over a sequence that is cut across ranks, as whole-op custom operators.

The forward and the backward of the whole ring are one `torch.library` operator each, with fakes and autograd, so
`torch.compile(fullgraph=True)` does not look inside and a checkpoint policy can keep (out, lse) and never run the
ring again. Tensors: q [B, L, H, D], k [B, L, G, D], v [B, L, G, E] with L this rank's tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.agreement import agree
from ringattn.executors import ring
from ringattn.executors.call import Call
from ringattn.kernels.interface import accumulate_dtype, row_delta
from ringattn.kernels.registry import choose_kernel
from ringattn.layout import make_layout
from ringattn.plan import make_plan
from ringattn.ranks import Ranks, group_name, ranks_named
from ringattn.version import __version__

__all__ = ["EXECUTORS", "ring_attention"]

EXECUTORS = {"ring": ring}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What other attention functions accept and this one does not compute: name -> (values that ask for nothing, advice).
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "dropout_p": ((0, 0.0), "train without attention dropout"),
    "attn_mask": ((None,), "masks are given by name: causal=True or False"),
    "window_size": ((None, (-1, -1)), "sliding windows are not computed yet"),
    "softcap": ((None, 0, 0.0), "apply the cap in a model of one rank, or leave it out"),
    "alibi_slopes": ((None,), "use rotary positions: ContextParallel.positions gives them"),
    "cu_seqlens": ((None,), "packed documents are not computed yet: pass one document a batch row"),
}


def refuse_unsupported(options: dict[str, Any]) -> None:
    """Raises for options that would change the result and are not computed.

    Raises:
        NotImplementedError: a known option with a value that asks for something.
        TypeError: a name that nobody knows.
    """
    for name, value in options.items():
        if name not in UNSUPPORTED:
            raise TypeError(f"ring_attention() got an unexpected keyword argument {name!r}")
        neutral, advice = UNSUPPORTED[name]
        if not any(value is same or (not isinstance(value, Tensor) and value == same) for same in neutral):
            raise NotImplementedError(f"got {name}={value!r}, which ring_attention does not compute: {advice}")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, tokens: int) -> None:
    """Whether this rank can take part with these tensors; `tokens` is what the layout gives it.

    Raises:
        ValueError, TypeError, NotImplementedError: what was got, and what to do instead.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"got {shapes}; need (batch, tokens, heads, head_dim) each")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"got dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast q, k and v to one dtype")
    if q.dtype not in DTYPES:
        raise TypeError(f"got {q.dtype}; cast q, k and v to one of {', '.join(map(str, DTYPES))}")
    if not q.device == k.device == v.device:
        raise ValueError(f"got devices {q.device}, {k.device}, {v.device}; move q, k and v to one device")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"got {shapes}; the batch sizes must be equal")
    if not q.shape[1] == k.shape[1] == v.shape[1]:
        raise ValueError(f"got {shapes}; q, k and v must be shards of one sequence, equally many tokens each")
    if k.shape[2] != v.shape[2] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"got {shapes}; k and v must have equally many heads, and q a multiple of them")
    if q.shape[3] != k.shape[3] or 0 in (q.shape[3], v.shape[3]):
        raise ValueError(f"got {shapes}; q and k must have the same head dim, and none may be empty")
    if q.shape[1] != tokens:
        raise ValueError(f"got {q.shape[1]} tokens where the layout holds {tokens}; cut the sequence with ContextParallel.shard")


def prepare(
    q: Tensor, k: Tensor, v: Tensor, group: str, layout: str, seq_len: int, causal: bool, scale: float, kernel: str, executor: str
) -> Call:
    """Turns an operator's arguments into a call, after all ranks have agreed on them if they are new."""
    ranks = ranks_named(group)
    ranks.calls += 1
    shapes = tuple((x.shape, x.dtype, x.device) for x in (q, k, v))
    configuration = (shapes, layout, seq_len, causal, scale, kernel, executor)
    if configuration not in ranks.agreed:
        agree_on(ranks, q, k, v, layout, seq_len, causal, scale, kernel, executor)
        ranks.agreed.add(configuration)
    chosen = choose_kernel(kernel, q, k, v).kernel
    plan = make_plan(layout, seq_len, ranks.size, causal=causal)
    return Call(plan, ranks.rank, chosen, scale, ranks.transport, ranks.buffers)


def agree_on(
    ranks: Ranks, q: Tensor, k: Tensor, v: Tensor, layout: str, seq_len: int, causal: bool, scale: float, kernel: str, executor: str
) -> None:
    """Checks a configuration here, and then against the other ranks'."""
    refusal, record = None, {}
    try:
        tokens = make_layout(layout, seq_len, ranks.size).lengths[ranks.rank]
        # Shards that do not add up are for all ranks together to judge, below: here each would blame itself.
        check_inputs(q, k, v, tokens if ranks.size == 1 else q.shape[1] if q.dim() == 4 else 0)
        record = {
            "version": __version__,
            "layout": layout,
            "seq_len": seq_len,
            "tokens": q.shape[1],
            "causal": causal,
            "batch": q.shape[0],
            "q_heads": q.shape[2],
            "kv_heads": k.shape[2],
            "head_dim": q.shape[3],
            "v_head_dim": v.shape[3],
            "dtype": str(q.dtype),
            "device": q.device.type,
            "softmax_scale": scale,
            "kernel": choose_kernel(kernel, q, k, v).kernel.name,
            "executor": executor,
        }
    except (ValueError, TypeError, NotImplementedError) as error:
        refusal = error
    agree(ranks, record, refusal)


SCHEMA = "str group, str layout, SymInt seq_len, bool causal, float scale, str kernel, str executor"


@torch.library.custom_op(
    "ringattn::forward", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)"
)
def attention_forward(q, k, v, group, layout, seq_len, causal, scale, kernel, executor):
    call = prepare(q, k, v, group, layout, seq_len, causal, scale, kernel, executor)
    return EXECUTORS[executor].forward(call, q, k, v)


@attention_forward.register_fake
def _(q, k, v, group, layout, seq_len, causal, scale, kernel, executor):
    batch, rows, heads, _ = q.shape
    return q.new_empty(batch, rows, heads, v.shape[3]), q.new_empty((batch, heads, rows), dtype=accumulate_dtype(q))


@torch.library.custom_op(
    "ringattn::backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def attention_backward(dout, dlse, q, k, v, out, lse, group, layout, seq_len, causal, scale, kernel, executor):
    call = prepare(q, k, v, group, layout, seq_len, causal, scale, kernel, executor)
    delta = row_delta(dout, out)
    if dlse is not None:
        if not call.kernel.reads_delta:
            raise NotImplementedError(
                f"kernel={call.kernel.name!r} cannot differentiate lse; use kernel='reference', or detach the lse"
            )
        delta -= dlse
    grads = EXECUTORS[executor].backward(call, dout, q, k, v, out, lse, delta)
    return tuple(grad.to(q.dtype).contiguous() for grad in grads)


@attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, group, layout, seq_len, causal, scale, kernel, executor):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def save_for_backward(ctx, inputs, output) -> None:
    q, k, v, *ctx.arguments = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def differentiate(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return *attention_backward(dout, dlse, q, k, v, out, lse, *ctx.arguments), *(None for _ in ctx.arguments)


attention_forward.register_autograd(differentiate, setup_context=save_for_backward)


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
        executor: "auto" or "ring".
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
    name = group_name(group)
    if seq_len is None:
        seq_len = q.shape[1] * ranks_named(name).size
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    executor = "ring" if executor == "auto" else executor
    out, lse = attention_forward(q, k, v, name, layout, seq_len, causal, float(softmax_scale), kernel, executor)
    return (out, lse) if return_lse else out
