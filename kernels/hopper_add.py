"""Sums in memory that many programs of the Hopper backward add to: TMA reductions, in any order or in a given one."""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOptionalMemberAccess=false

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["await_turn", "reduce_add", "reduced", "store_spread", "viewed", "write"]

write = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global  # its name until Triton 3.7


@_core.builtin
def reduce_add(desc, coord, src, _semantic=None):
    """TMA from shared memory that adds to what is in memory: `tma.async_atomic_add` since Triton 3.8."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@_core.builtin
def viewed(x, dtype, shape, layout, _semantic=None):
    """Shared memory taken for something else: a method of its descriptor whose name has changed."""
    shape = [getattr(n, "value", n) for n in shape]
    return _semantic.memdesc_reinterpret(x, getattr(dtype, "value", dtype), shape, getattr(layout, "value", layout))


@gluon.jit
def reduced():
    """Waits until what this thread has stored or added by TMA is in memory, not only read from shared memory."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def await_turn(counter, turn):
    """Waits until a counter in memory has come to `turn`; what was added before that is there, for TMA too."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred early; .reg .s32 seen;
        AGAIN:
        ld.acquire.gpu.global.s32 seen, [$1];
        setp.lt.s32 early, seen, $2;
        @early bra AGAIN;
        fence.proxy.async.global;
        mov.s32 $0, seen;
        }""",
        "=r,l,r", [counter.to(gl.uint64), turn], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def spread_layout():
    """[64, 64] fp32 as TMA wants it, lines of 128 bytes whose 16-byte pieces are swapped by the number of the row; and
    in odd rows, columns 16 apart swapped as well."""
    line = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]]
    rows = [[1, 4 ^ 16], [2, 8], [4, 16], [8, 0], [16, 0], [32, 0]]
    return gl.SharedLinearLayout(line + rows + [[0, 32]], alignment=1024)


@gluon.jit
def store_spread(s_x, b_x):
    """Stores a product [64, 64] without bank conflicts: of two rows that would meet in the same banks, odd ones store
    other columns first."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, b_x.type.layout))
    left, right = gl.split(gl.permute(gl.reshape(b_x, [64, 2, 2, 16]), [0, 1, 3, 2]))
    b_swapped = gl.reshape(gl.permute(gl.join(right, left), [0, 1, 3, 2]), [64, 64])
    b_swapped = gl.convert_layout(b_swapped, b_x.type.layout)
    viewed(s_x, gl.float32, [64, 64], spread_layout()).store(gl.where((row % 2 == 1)[:, None], b_swapped, b_x))
