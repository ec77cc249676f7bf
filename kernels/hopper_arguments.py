"""How a tensor is handed to a Hopper kernel: as a tensor descriptor that says how blocks lie in shared memory too."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .interface import Arrival
from .triton_arguments import Form, block_width, describe

__all__ = ["NARROWEST", "Described", "HopperForm", "arriving", "described", "processors"]

NARROWEST = 64  # columns of a block, 128 bytes: narrower ones would be copied no faster
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32, torch.int32: gl.int32}


class HopperForm(Form):
    """How blocks lie in shared memory as well."""

    def __init__(self, shape: list[int], strides: list[int], block_shape: list[int], dtype: torch.dtype):
        super().__init__(shape, strides, block_shape)
        self.layout: Any = gl.NVMMASharedLayout.get_default_for(block_shape, TYPES[dtype])


class Described(TensorDescriptor):
    """See `triton_arguments.Described`."""

    def __init__(self, base: Tensor, form: HopperForm):
        self.base, self.form, self.layout = base, form, form.layout
        self.shape, self.strides, self.block_shape = form.shape, form.strides, form.block_shape


def described(x: Tensor, rows: int, width: int | None = None) -> Described:
    """x [B, L, H, D] as [B, H, L, D], in blocks of one head, `rows` rows and `width` columns (D, rounded up, unless
    told), or a copy of x where it cannot be described. What lies outside of x reads as zero and is not written."""
    form = form_of(x.shape, x.stride(), x.dtype, rows, width)
    if form is None or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
        form = form_of(x.shape, x.stride(), x.dtype, rows, width)
        assert form is not None, f"no descriptor of a contiguous tensor of shape {x.shape}"
    return Described(x, form)


@lru_cache(1024)
def form_of(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, rows: int, width: int | None
) -> HopperForm | None:
    """Its form, or None if there can be none."""
    form = describe(shape, stride, dtype.itemsize, rows)
    if form is None:
        return None
    return HopperForm(*form[:2], [1, 1, rows, width or max(block_width(shape[-1]), NARROWEST)], dtype)


def arriving(arrival: Arrival | None, keys: int, width: int | None = None) -> tuple:
    """What a kernel is told of keys on their way, which it reads in blocks so long: far_k, far_v, flags, error, epoch,
    SHARED, SLOT and PATIENCE."""
    if arrival is None:
        return None, None, None, None, None, 1, 1, 0
    k, v, flags, epoch, slot, patience, error = arrival
    far = described(k, keys, width), described(v, keys, width)
    return *far, flags, error, epoch, v.shape[2] // flags.shape[1], slot, patience


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an H200's where there is none, which is how kernels are compiled ahead of time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
