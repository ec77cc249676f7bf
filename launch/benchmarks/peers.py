"""Other packages that compute attention across ranks, called as their users call them.

Each names the kernel of torch beneath it: cuDNN's or FlashAttention-2. Sources: torch.distributed.tensor.experimental
(2.11) and ring-flash-attn 0.1.8.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..oracle import Case, Inputs
from . import flash_attn_shim
from .across import Across
from .local import other_mask
from .torch_kernels import flash_mask

__all__ = ["RINGS", "RingFlashAttention", "RingFlashAttentionPacked", "TorchContextParallel", "backends"]

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "aten": SDPBackend.FLASH_ATTENTION}  # by the names of our kernels


def backends(kernel: str, x: Tensor) -> list[SDPBackend]:
    """What torch may use. On CPUs its flash attention does not take grouped heads."""
    return [BACKENDS[kernel]] if x.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


class TorchContextParallel(Across):
    """torch's context_parallel, which replaces scaled_dot_product_attention while it is entered."""

    heads_first = True

    def __init__(self, rotation: str, kernel: str, causal: bool):
        self.rotation, self.kernel = rotation, kernel
        self.name = f"torch-cp-{rotation}"
        self.layout = "zigzag" if causal else "contiguous"  # its load balancing wants a causal mask

    def refuses(self, x: Inputs, case: Case, ranks: int) -> str | None:
        if not x.q.is_cuda:
            return f"torch's context_parallel runs its CUDA kernels only, not on {x.q.device.type}"
        return super().refuses(x, case, ranks)

    @contextmanager
    def ready(self, case: Case, device: torch.device) -> Iterator[None]:
        module = import_module("torch.distributed.tensor.experimental._attention")
        module.set_rotate_method(self.rotation)
        module._cp_options.enable_load_balance = case.causal
        ranks = dist.get_world_size()
        mesh = init_device_mesh(device.type, (ranks,))
        something = torch.zeros(1, 2 * ranks, device=device)  # it takes no empty list of buffers
        with (
            module.context_parallel(mesh, buffers=[something], buffer_seq_dims=[1]),
            sdpa_kernel(backends(self.kernel, something)),
        ):
            yield

    def attend(self, q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=True)


RINGS = ("ring", "zigzag", "stripe")
VARIANTS = {  # of ring-flash-attn: function, layout
    "ring": ("ring_flash_attn_func", "contiguous"),
    "zigzag": ("zigzag_ring_flash_attn_func", "zigzag"),
    "stripe": ("stripe_flash_attn_func", "striped"),
    "llama3": ("llama3_flash_attn_varlen_func", "contiguous"),
}


class RingFlashAttention(Across):
    """The package ring-flash-attn. Its face for transformers, which imports that, is left out."""

    def __init__(self, variant: str, kernel: str):
        self.variant, self.kernel = variant, kernel
        self.name = f"ring-flash-attn-{variant}"
        self.function, self.layout = VARIANTS[variant]

    def refuses(self, x: Inputs, case: Case, ranks: int) -> str | None:
        if find_spec("ring_flash_attn") is None:
            return "not installed"
        if self.variant != "ring" and not case.causal:
            return "takes a causal mask only"
        if x.q.dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 and bfloat16, as flash-attn does, not {x.q.dtype}"
        return super().refuses(x, case, ranks)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
        return ring_flash_attn(self.kernel, self.function)(q, k, v, causal=case.causal)


class RingFlashAttentionPacked(RingFlashAttention):
    """Its way for packed documents: all keys gathered, head by head, over FlashAttention-2. It also takes windows."""

    any_mask = True

    def __init__(self):
        super().__init__("llama3", "aten")

    def refuses(self, x: Inputs, case: Case, ranks: int) -> str | None:
        if other_mask(case) is None:
            return "is for documents and windows; without them its zigzag is meant"
        if not x.q.is_cuda or case.batch > 1:
            return "takes one row on CUDA devices"
        if case.seq_len % ranks:
            return f"{case.seq_len} tokens do not divide among {ranks} ranks"
        return super().refuses(x, case, ranks)

    @contextmanager
    def ready(self, case: Case, device: torch.device) -> Iterator[None]:
        bounds = torch.tensor(case.documents or (0, case.seq_len), dtype=torch.int32, device=device)
        prepare = ring_flash_attn(self.kernel, "llama3_flash_attn_prepare_cu_seqlens")
        *cum, keys = prepare(bounds, case.causal, dist.get_rank(), dist.get_world_size())
        _, _, window = flash_mask(case, device)
        self.options = {"causal": case.causal, "window_size": (window.get("window_size_left", -1), -1)}
        self.shapes = (*cum, 1, keys)  # one head at a time, as its documentation has it
        yield

    def attend(self, q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
        function = ring_flash_attn(self.kernel, self.function)
        return function(q[0], k[0], v[0], *self.shapes, **self.options)[None]


def ring_flash_attn(kernel: str, function: str) -> Any:
    """A function of the package, over flash-attn or what stands for it."""
    if "ring_flash_attn" not in sys.modules:
        if not flash_attn_shim.installed():
            flash_attn_shim.serve(kernel)
        adapters = ModuleType("ring_flash_attn.adapters")
        for name in ("substitute_hf_flash_attn", "update_ring_flash_attn_params"):
            setattr(adapters, name, partial(left_out, name))
        sys.modules[adapters.__name__] = adapters
    return getattr(import_module("ring_flash_attn"), function)


def left_out(name: str, *arguments: Any, **options: Any) -> None:
    raise NotImplementedError(f"{name} is not measured here")
