"""The whole ring as one operator forward and one backward, with fakes and autograd.

So `torch.compile(fullgraph=True)` does not look inside, and a checkpoint policy can keep (out, lse) and never run the
ring again. Where nobody looks, the same functions run without the operators around them. cu_seqlens travels as the
tensor that it is, so that new documents do not compile anew, and becomes a plan inside.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.function import once_differentiable

from ringattn.executors.home import delta_of
from ringattn.kernels.interface import accumulate_dtype
from ringattn.preparation import Settings, prepare
from ringattn.replay import replayed
from ringattn.sinks import seen_by_sinks, sink_gradients

__all__ = ["attend"]

SETTINGS = (
    "str group, str layout, SymInt? seq_len, bool causal, float scale, str kernel, str executor, "
    "int window_left, int window_right, int balance_left, int balance_right, float softcap, bool deterministic"
)
SHARED = f"Tensor? sinks, Tensor? cu_seqlens, {SETTINGS}"  # what the forward and the backward are both told


def forward(q, k, v, sinks, cu_seqlens, settings: Settings) -> tuple[Tensor, Tensor]:
    """out and lse."""
    executor, call = prepare(q, k, v, sinks, cu_seqlens, settings)
    if not call.schedule.replay or sinks is not None:
        return executor.forward(call, q, k, v, None if sinks is None else seen_by_sinks(sinks, q, v))
    batch, rows, heads, _ = q.shape
    into = q.new_empty(batch, rows, heads, v.shape[3]), q.new_empty((batch, heads, rows), dtype=accumulate_dtype(q))
    replaying: Any = executor  # only one that can is told to

    def work() -> None:
        for x, found in zip(into, replaying.forward(call, q, k, v, into=into), strict=True):
            if x is not found:
                x.copy_(found)

    replayed(call, (q, k, v, *into), work)
    return into


def backward(dout, dlse, q, k, v, out, lse, sinks, cu_seqlens, settings: Settings) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of the sinks, empty if there are none."""
    executor, call = prepare(q, k, v, sinks, cu_seqlens, settings)
    if call.schedule.replay and sinks is None and dlse is None:
        into = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        replaying: Any = executor  # only one that can is told to
        work = partial(replaying.backward, call, dout, q, k, v, out, lse, None, into=into)
        replayed(call, (dout, q, k, v, out, lse, *into), work)
        return *into, q.new_empty(0)
    if dlse is not None and not call.kernel.reads_delta:
        raise NotImplementedError(
            f"kernel={call.kernel.name!r} cannot differentiate lse; use kernel='reference', or detach the lse"
        )
    grads = executor.backward(call, dout, q, k, v, out, lse, dlse)
    dsinks = q.new_empty(0) if sinks is None else sink_gradients(sinks, lse, delta_of(call.kernel, dout, out, dlse))
    return *grads, dsinks


forward_operator = torch.library.custom_op(
    "ringattn::forward",
    lambda q, k, v, sinks, cu_seqlens, *settings: forward(q, k, v, sinks, cu_seqlens, Settings(*settings)),
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {SHARED}) -> (Tensor, Tensor)",
)

backward_operator = torch.library.custom_op(
    "ringattn::backward",
    lambda *inputs: backward(*inputs[:9], settings=Settings(*inputs[9:])),  # pyright: ignore[reportCallIssue]
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{SHARED}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@forward_operator.register_fake
def _(q, k, v, *rest):
    batch, rows, heads, _ = q.shape
    return q.new_empty(batch, rows, heads, v.shape[3]), q.new_empty((batch, heads, rows), dtype=accumulate_dtype(q))


@backward_operator.register_fake
def _(dout, dlse, q, k, v, out, lse, sinks, *rest):
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), dsinks


def remember(ctx, inputs: tuple, settings: Settings, output: tuple[Tensor, Tensor]) -> None:
    """What `differentiate` wants."""
    q, k, v, sinks, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, cu_seqlens)
    ctx.set_materialize_grads(False)
    ctx.settings = settings


def differentiate(ctx, dout, dlse) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, sinks, cu_seqlens = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    inputs = dout, dlse, q, k, v, out, lse, sinks, cu_seqlens
    *grads, dsinks = backward_operator(*inputs, *ctx.settings) if watched(q, k, v) else backward(*inputs, ctx.settings)
    return *grads, None if sinks is None else dsinks, None, *(None for _ in ctx.settings)


forward_operator.register_autograd(
    differentiate, setup_context=lambda ctx, inputs, output: remember(ctx, inputs[:5], Settings(*inputs[5:]), output)
)


class Attention(torch.autograd.Function):
    """The operators without torch's dispatch to Python, which costs more than the launches of a short sequence. One
    argument holds all settings, and the context is an argument: torch looks at each, and at signatures, every time."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, cu_seqlens, settings):  # pyright: ignore[reportIncompatibleMethodOverride]
        output = forward(q, k, v, sinks, cu_seqlens, settings)
        remember(ctx, (q, k, v, sinks, cu_seqlens), settings, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):  # pyright: ignore[reportIncompatibleMethodOverride]
        return differentiate(ctx, dout, dlse)[:6]


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """out and lse of this rank's queries over the keys and values of all ranks; differentiable."""
    if watched(*(x for x in (q, k, v, sinks, cu_seqlens) if x is not None)):
        return forward_operator(q, k, v, sinks, cu_seqlens, *settings)
    return Attention.apply(q, k, v, sinks, cu_seqlens, settings)


def watched(*tensors: Tensor) -> bool:
    """Whether somebody must see operators: a compiler, a checkpoint policy, a transform, a tensor of another kind."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)
    )
