"""How a tensor is handed to a Hopper kernel: as a tensor descriptor that says how blocks lie in shared memory too."""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .triton_arguments import block_width, describe

__all__ = ["NARROWEST", "CheckedDescriptor", "describable", "described", "processors"]

NARROWEST = 64  # columns of a block, 128 bytes: narrower ones would be copied no faster
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def described(x: Tensor, rows: int, width: int | None = None) -> TensorDescriptor:
    """x [B, L, H, D] as [B, H, L, D], in blocks of one head, `rows` rows and `width` columns (D, rounded up, unless
    told), or a copy of x where it cannot be described. What lies outside of x reads as zero and is not written."""
    x = x if describable(x) else x.contiguous()
    form = form_of(x.shape, x.stride(), x.dtype, rows, width)
    assert form is not None, f"no descriptor of a contiguous tensor of shape {x.shape}"
    return CheckedDescriptor(x, *form)


def describable(x: Tensor) -> bool:
    """Whether there can be a descriptor of x as it lies."""
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and form_of(x.shape, x.stride(), x.dtype, 1) is not None


@lru_cache(1024)
def form_of(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, rows: int, width: int | None = None
) -> tuple | None:
    """Shape, strides, block and layout; None if there can be no descriptor."""
    form = describe(shape, stride, dtype.itemsize, rows)
    if form is None:
        return None
    block = [1, 1, rows, width or max(block_width(shape[-1]), NARROWEST)]
    return *form[:2], block, gl.NVMMASharedLayout.get_default_for(block, TYPES[dtype])


class CheckedDescriptor(TensorDescriptor):
    """One that `form_of` has checked, once per shape; Triton's own checks cost as much as a tenth of a launch."""

    def __post_init__(self) -> None:
        pass


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an H200's where there is none, which is how kernels are compiled ahead of time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
