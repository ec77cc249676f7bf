"""Starts kernels; Triton binds their arguments the first time only.

At each `kernel[grid](...)` Triton looks at every argument to find the variant that it needs, which takes three times as
long as to start it. A variant follows from constants, from integers (which are 1, or multiples of 16), and from the
dtype and the alignment of what pointers point to. So what Triton chose is kept under all of these, and started as it
is, `compiled[grid](...)`, where they come again. On AMD GPUs a variant also follows from how large a tensor's storage
is; there arguments are bound each time.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Constants", "launch"]

Constants = tuple[tuple[str, Any], ...]  # what a kernel is compiled for besides its arguments: (name, value)
KEPT = 4096  # launches that differ, at most

kept: dict[Hashable, tuple[Any, tuple]] = {}


def launch(
    kernel: Any,
    device: torch.device,
    grid: tuple[int, int, int],
    operands: tuple[Any, ...],
    steps: tuple[tuple[int, ...] | None, ...],
    constants: Constants,
    **more: Any,
) -> None:
    """Starts a kernel on the current stream of a device.

    Args:
        kernel: takes `operands`, then `steps`, then `constants`.
        operands: tensors, descriptors (`triton_arguments.Described`), None, and numbers. Integers only say how long
            something is: the kernel must not be specialised on them.
        steps: strides. Kernels are specialised on them: blocks are read 16 bytes at a time where strides allow it.
        constants, more: its constexpr parameters, and options of the compiler.
    """
    if 0 in grid:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, device, grid, operands, steps, constants, **more)
    key = (kernel.fn, device, steps, constants, *more.items(), *map(kind, operands))
    known = kept.get(key)
    if known is not None:
        compiled, values = known
        compiled[grid](*operands, *steps, *values)
        return
    named = {**dict(constants), **more}
    compiled = kernel[grid](*operands, *steps, **named)
    if compiled is None or torch.version.hip:  # the interpreter compiles nothing
        return
    names = list(kernel.signature.parameters)
    lengths = {name for name, x in zip(names, operands, strict=False) if isinstance(x, int)}
    assert lengths <= set(kernel.do_not_specialize), f"{kernel} is specialised on {lengths}"
    if len(kept) == KEPT:
        kept.clear()
    kept[key] = compiled, tuple(named[name] for name in names if name in named)


def kind(x: Any) -> Hashable:
    """What a variant follows from of an operand."""
    if isinstance(x, int):
        return x.bit_length() > 31
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return type(x) if x is None or isinstance(x, float) else x.form
