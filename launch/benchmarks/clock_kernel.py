"""Reads the counters of multiprocessors: which one, its cycles, and nanoseconds of the GPU's clock."""

# pyright: reportInvalidTypeForm=false

# Triton reads annotations and globals of kernels: no `from __future__ import annotations` here.
import triton
import triton.language as tl

__all__ = ["clock_kernel"]


@triton.jit
def clock_kernel(p_counts):
    """counts [programs, 3] int64."""
    p_counts += 3 * tl.program_id(0)
    number = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], tl.int32, is_pure=False, pack=1)
    cycles = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], tl.int64, is_pure=False, pack=1)
    now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], tl.int64, is_pure=False, pack=1)
    tl.store(p_counts, number.to(tl.int64))
    tl.store(p_counts + 1, cycles)
    tl.store(p_counts + 2, now)
