"""What the Hopper kernels of both directions share: names that moved between releases of Triton, named barriers,
the TMA reduction, tiles and runs.

Gluon (`triton.experimental.gluon`) says itself which warps do what and where tiles lie. What it has no words for, a few
PTX instructions, stands here as inline assembly.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import tma

from . import triton_tile

__all__ = ["await_turn", "fetch", "named_sync", "product_layout", "reduce_add", "reduced", "run_at", "viewed"]

run_at = gluon.jit(triton_tile.run_at.fn)
fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name until Triton 3.6


@gluon.constexpr_function
def product_layout(columns):
    """How one warpgroup holds 64 rows of a product: a row lies in four lanes, its columns in turns of eight."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def barrier_asm(operation, barrier, threads):
    operation, barrier, threads = (getattr(x, "value", x) for x in (operation, barrier, threads))
    return f"bar.{operation} {barrier}, {threads}; mov.b32 $0, 0;"


@gluon.jit
def named_sync(BARRIER: gl.constexpr, THREADS: gl.constexpr):
    """Waits until `THREADS` threads, this warpgroup's included, have come to a barrier. Triton itself uses the barriers
    0 to 8."""
    gl.inline_asm_elementwise(barrier_asm("sync", BARRIER, THREADS), "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@_core.builtin
def reduce_add(desc, coord, src, _semantic=None):
    """TMA from shared memory that adds to what is in memory: `tma.async_atomic_add` since Triton 3.8."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@gluon.jit
def reduced():
    """Waits until what this warp has reduced is in memory, not only read from shared memory."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def await_turn(counter, turn):
    """Waits until a counter in memory has come to `turn`; what was written before is there, for TMA too."""
    gl.inline_asm_elementwise(
        """{ .reg .pred early; .reg .s32 seen;
        AGAIN: ld.acquire.gpu.global.s32 seen, [$1]; setp.lt.s32 early, seen, $2; @early bra AGAIN;
        fence.proxy.async.global; mov.s32 $0, seen; }""",
        "=r,l,r", [counter.to(gl.uint64), turn], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@_core.builtin
def viewed(x, dtype, shape, layout, _semantic=None):
    """Shared memory read as something else: a method of its descriptor that has changed its name."""
    shape = [getattr(n, "value", n) for n in shape]
    return _semantic.memdesc_reinterpret(x, getattr(dtype, "value", dtype), shape, getattr(layout, "value", layout))
