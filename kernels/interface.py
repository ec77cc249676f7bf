"""What a local attention kernel is: the one interface that executors call.

Shapes, here and in every kernel:

    B batch    L query rows here    M keys here    H query heads    G key/value heads (H % G == 0)
    D head dim of q and k    E head dim of v (and of out)

    q_BLHD  k_BMGD  v_BMGE  out_BLHE  lse_BHL (natural log)

A kernel is told which keys each row may see by a list of segments (`segments.py`) and nothing else: no
layouts, no masks, no ranks. Partial results are pairs (out, lse) that merge exactly (`merge.py`), so a
caller may give it the keys piece by piece:

    out, lse = kernel.forward(q, k0, v0, segments0, scale=scale)
    out, lse = kernel.forward(q, k1, v1, segments1, scale=scale, running=(out, lse))

and gradients likewise, because with the *global* lse and delta each piece's dq, dk and dv only add up
(FlashAttention-2, arXiv:2307.08691, section 3.1.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .segments import Segments

__all__ = ["Arrival", "Capped", "Kernel", "Part", "Three", "accumulate_dtype", "nothing_seen", "row_delta", "settled"]


Three = tuple[Tensor, Tensor, Tensor]


class Part(NamedTuple):
    """Gradients dk, dv of the stretch `keys` of a shard, [B, keys, G, D] and [B, keys, G, E]."""

    keys: slice
    dk: Tensor
    dv: Tensor

    def within(self, start: int, stop: int) -> Part:
        """That of fewer keys."""
        inside = slice(start - self.keys.start, stop - self.keys.start)
        return Part(slice(start, stop), self.dk[:, inside], self.dv[:, inside])


class Arrival(NamedTuple):
    """Keys and values that arrive while the kernel runs: it reads those of a source only once their flag has come. Only
    a kernel that says so takes this: in `waits` that its forward does, in `delivers` that its backward does.

    Segments count keys in slots: the first holds the keys that the kernel is called with, the others these.
    k, v: [B, sources * slot, G, D] and [B, sources * slot, G, E].
    flags: int32 [sources, F], on the device, F a divisor of G: of every source the first G / F heads have a flag, and
        so on. They are there as soon as it has reached `epoch` (int32 [1], on the device; may wrap around).
    patience_ns: how long to wait for one flag. When it is over, `error` (int32 [1]), which must hold 0, becomes one
        more than the flag's place in `flags`, no flag is waited for any longer, and what is computed from then on is
        NaN: all of out and lse; of gradients what follows from these keys. So it is if `error` does not hold 0 to begin
        with.
    """

    k: Tensor
    v: Tensor
    flags: Tensor
    epoch: Tensor
    slot: int
    patience_ns: int
    error: Tensor


class Kernel(Protocol):
    """A local attention kernel."""

    name: str
    reads_delta: bool  # False: derives it from out and dout, so a gradient of lse cannot reach it
    caps_scores: bool  # whether forward and backward also take `softcap`: see `Capped`

    def refuses(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why this kernel cannot run on such inputs, or None if it can."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        *,
        scale: float,
        running: tuple[Tensor, Tensor] | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over the segments, merged with what was seen before.

        Args:
            q (Tensor): [B, L, H, D].
            k (Tensor): [B, M, G, D], same dtype.
            v (Tensor): [B, M, G, E], same dtype.
            segments: the pairs that are visible; they must not overlap. May be empty.
            scale: factor on the scores before the softmax.
            running: (out, lse) of keys seen before, in `accumulate_dtype`; the kernel may write into both.
            out_dtype: dtype of the returned out; `accumulate_dtype(q)` unless told.

        Returns:
            out [B, L, H, E], lse [B, H, L] in `accumulate_dtype`. A row that has seen nothing has out 0, lse -inf.
        """
        ...

    def row_delta(self, dout: Tensor, out: Tensor) -> Tensor:
        """`row_delta`, as this kernel computes it."""
        ...

    def settled(
        self, dq: Tensor, own: Sequence[Part], parts: Sequence[Part], dtype: torch.dtype, into: Three | None = None,
        kept: dict[Any, Any] | None = None,
    ) -> Three:  # fmt: skip
        """`settled`, as this kernel computes it."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        delta: Tensor,
        segments: Segments,
        *,
        scale: float,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the segments contribute to dq, dk and dv, in `accumulate_dtype`.

        Args:
            dout (Tensor): [B, L, H, E] gradient of out, in the dtype of q.
            out, lse: the final, merged result of the forward, [B, L, H, E] and [B, H, L].
            delta: [B, H, L], `row_delta(dout, out)` less the gradient of lse, if it has one.
            dq, dk, dv: running sums to add to, in place. One that is None starts from zero.
            out_dtype: what the gradients will be `settled` in, if nothing will be added to them. Those that start from
                zero may have this dtype already.
        """
        ...


class Capped:
    """A kernel whose scores are capped, softcap * tanh(scale q k / softcap), for callers that need not know."""

    caps_scores = True

    def __init__(self, kernel: Kernel, softcap: float):
        if not kernel.caps_scores:
            raise NotImplementedError(f"kernel={kernel.name!r} does not cap scores; use kernel='auto'")
        self.kernel: Any = kernel  # its methods take one argument more
        self.softcap = softcap
        self.name, self.reads_delta = kernel.name, kernel.reads_delta
        self.refuses, self.row_delta, self.settled = kernel.refuses, kernel.row_delta, kernel.settled

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return self.kernel.forward(*arguments, **options, softcap=self.softcap)

    def backward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.kernel.backward(*arguments, **options, softcap=self.softcap)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of partial results: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """delta_BHL = sum over E of dout * out: what the softmax's normalisation takes from every score's gradient."""
    dtype = accumulate_dtype(dout)
    return (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(1, 2).contiguous()


def settled(
    dq: Tensor, own: Sequence[Part], parts: Sequence[Part], dtype: torch.dtype, into: Three | None = None,
    kept: dict[Any, Any] | None = None,
) -> Three:  # fmt: skip
    """Contiguous dq, dk and dv of a dtype: sums as `Kernel.backward` gives them, added up and rounded once.

    Args:
        dq: [B, L, H, D]; may lie in any order.
        own: gradients of all keys of a shard, in one part or two, those of each sequence contiguous; may be written to.
        parts: what is added to them, in this order; those of each sequence contiguous.
        into: where the results are to be, contiguous.
        kept: where a kernel keeps what follows from where parts lie, for the next time.
    """
    for each, part in product(own, parts):
        start, stop = max(each.keys.start, part.keys.start), min(each.keys.stop, part.keys.stop)
        if start < stop:
            for total, more in zip(each.within(start, stop)[1:], part.within(start, stop)[1:], strict=True):
                total.add_(more)
    keys = max(part.keys.stop for part in own)
    if into is None:
        sums = (dq, dq.shape[1]), (own[0].dk, keys), (own[0].dv, keys)
        new_q, new_k, new_v = (x.new_empty((x.shape[0], length, *x.shape[2:]), dtype=dtype) for x, length in sums)
        into = new_q, new_k, new_v
    into[0].copy_(dq)
    for part in own:
        into[1][:, part.keys].copy_(part.dk)
        into[2][:, part.keys].copy_(part.dv)
    return into


def nothing_seen(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of rows that have seen no key yet: the neutral element of the merge."""
    batch, rows, heads, _ = q.shape
    dtype = accumulate_dtype(q)
    out = q.new_zeros(batch, rows, heads, v.shape[-1], dtype=dtype)
    return out, q.new_full((batch, heads, rows), -torch.inf, dtype=dtype)
