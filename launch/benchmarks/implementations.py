"""All implementations of local attention that the benches know: our kernels, and the peers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from ringattn.kernels.interface import Kernel, Part
from ringattn.kernels.registry import KERNELS
from ringattn.kernels.segments import Segments
from ringattn.plan import make_plan

from ..oracle import Case, Inputs
from .local import Differentiated, Implementation, Saved
from .torch_kernels import TorchCudnn, TorchFlash, TorchMath

__all__ = ["FlashAttention4", "Ours", "local_implementations"]


class Ours(Implementation):
    """A kernel of this package over the one segment that is the whole sequence."""

    def __init__(self, named: str, deterministic: bool = False):
        self.named = named
        self.name = f"ringattn-{named}" + "-deterministic" * deterministic
        self.deterministic = deterministic

    @property
    def kernel(self) -> Kernel:
        found: Any = KERNELS[self.named]
        return found.ordered(True) if self.deterministic else found

    def refuses(self, x: Inputs, case: Case) -> str | None:
        return self.kernel.refuses(x.q, x.k, x.v)

    def segments(self, case: Case) -> Segments:
        return make_plan("contiguous", case.seq_len, 1, **case.mask).segments(0, 0)

    def forward(self, x: Inputs, case: Case) -> Saved:
        segments, scale = self.segments(case), case.head_dim**-0.5
        out, lse = self.kernel.forward(x.q, x.k, x.v, segments, scale=scale, out_dtype=x.q.dtype)
        return out, lse, segments, scale

    def backward(self, x: Inputs, saved: Saved, case: Case) -> tuple[Tensor, ...]:
        out, lse, segments, scale = saved
        delta = self.kernel.row_delta(x.dout, out)
        inputs, dtype = (x.dout, x.q, x.k, x.v, out, lse, delta, segments), x.q.dtype
        dq, dk, dv = self.kernel.backward(*inputs, scale=scale, out_dtype=dtype)
        return self.kernel.settled(dq, [Part(slice(0, dk.shape[1]), dk, dv)], [], dtype)


class FlashAttention4(Differentiated):
    """FlashAttention-4, where its package is installed."""

    name = "fa4"

    def refuses(self, x: Inputs, case: Case) -> str | None:
        try:
            import_module("flash_attn.cute.interface")
        except ImportError as error:
            return f"not installed ({error})"
        return super().refuses(x, case)

    def forward(self, x: Inputs, case: Case) -> Saved:
        result = import_module("flash_attn.cute.interface").flash_attn_func(x.q, x.k, x.v, causal=case.causal)
        return result if isinstance(result, tuple) else (result,)  # releases differ: with lse or without


def local_implementations() -> dict[str, Implementation]:
    """All that this bench knows, by name: our kernels first, then the peers.

    A kernel whose order of sums is a choice appears in both ways.
    """
    ours = [Ours(name) for name in KERNELS]
    ours += [Ours(name, deterministic=True) for name, each in KERNELS.items() if hasattr(each, "ordered")]
    return {each.name: each for each in (*ours, TorchFlash(), TorchCudnn(), TorchMath(), FlashAttention4())}
