"""How a tensor is handed to a Triton kernel: as a pointer with strides, or as a tensor descriptor.

What follows from a shape is worked out once per shape, because the host pays for every launch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tuning import Tiling

__all__ = ["Described", "Form", "addressable", "block_width", "describe", "strides", "walked"]

WIDEST_STRIDE = 1 << 23  # elements from row to row: offsets inside a block are 32-bit


def addressable(x: Tensor) -> Tensor:
    """x, or a contiguous copy where the kernels cannot reach it as it lies."""
    return x if x.stride(-1) == 1 and x.stride(1) < WIDEST_STRIDE else x.contiguous()


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the last; 0 for one of size 1, whose own is arbitrary and would compile anew."""
    return steps_of(x.shape, x.stride())


@lru_cache(1024)
def steps_of(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(0 if n == 1 else step for n, step in zip(shape[:-1], stride[:-1], strict=True))


def walked(x: Tensor, tiling: Tiling, block: int) -> tuple[Tensor | Described, tuple[int, ...] | None]:
    """What a kernel walks x [B, L, H, D] with, in blocks of `block` rows: the tensor and its strides, or a descriptor
    alone, where the tiling wants one and x lies so that there can be one."""
    if tiling.tma and x.numel() and x.data_ptr() % 16 == 0:
        form = form_of(x.shape, x.stride(), x.dtype, block)
        if form is not None:
            return Described(x, form), None
    return x, strides(x)


class Form:
    """All that a descriptor says but where the tensor begins. Compared by identity: kept by what it was made of."""

    def __init__(self, shape: list[int], strides: list[int], block_shape: list[int]):
        self.shape, self.strides, self.block_shape = shape, strides, block_shape


@lru_cache(1024)
def form_of(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, block: int) -> Form | None:
    """The form that describes [B, L, H, D] as [B, H, L, D] in blocks of `block` rows, if there can be one."""
    described = describe(shape, stride, dtype.itemsize, block)
    return None if described is None else Form(*described)


def describe(
    shape: torch.Size, stride: tuple[int, ...], element_size: int, block: int
) -> tuple[list[int], list[int], list[int]] | None:
    """Shape, strides and block that describe [B, L, H, D] as [B, H, L, D]; None where rows are not contiguous, not a
    multiple of 16 bytes apart, or lie on one another."""
    unit = 16 // element_size
    b, length, h = (unit if n == 1 else step for n, step in zip(shape[:-1], stride[:-1], strict=True))
    if stride[-1] != 1 or any(step == 0 or step % unit for step in (b, length, h)):
        return None
    batch, rows, heads, width = shape
    return [batch, heads, rows, width], [b, h, length, 1], [1, 1, block, block_width(width)]


class Described(TensorDescriptor):
    """A descriptor of a form that was checked when it was made; Triton's own checks, each time, would cost as much as
    the launch."""

    def __init__(self, base: Tensor, form: Form):
        self.base, self.form = base, form
        self.shape, self.strides, self.block_shape = form.shape, form.strides, form.block_shape


def block_width(head_dim: int) -> int:
    """Columns of a block: the next power of two, no fewer than a product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())
