"""From a block of scores to the left operand of P V, as one warpgroup of the Hopper forward does it in registers.

Three things are other than in the portable kernel (`triton_forward`), because here every instruction counts:

- A row's maximum is taken anew only once it has grown by more than 2^SLACK. Until then P is a little larger than one,
  which a float carries as well, and the sums need no rescaling; that is a branch of each warp, mostly not taken.
- The sum of a row stays eight partial sums until its tile is done, so lanes need not exchange anything for it.
- P is kept as pairs of 16-bit numbers in one register each, as the matrix units take it.

Names as in `triton_forward`.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportCallIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["add_up", "centre", "eighths", "hide", "hold_back", "pack", "shrink", "unpack"]

SLACK = gl.constexpr(8.0)


@gluon.jit
def hide(b_s, last_key, oldest_key, WINDOW: gl.constexpr):
    """Scores with -inf where a row does not see a key: those after `last_key`, and with a window up to `oldest_key`.

    In assembly, because there columns are constants; the compiler keeps them all in registers."""
    EACH: gl.constexpr = b_s.shape[0] * b_s.shape[1] // 128  # numbers in a thread, of two rows in turn
    b_s, last_key = gl.broadcast(b_s, last_key[:, None])
    if WINDOW:
        b_s, oldest_key = gl.broadcast(b_s, oldest_key[:, None])
        return gl.inline_asm_elementwise(
            hide_asm(EACH, True), tied(EACH) + 2 * EACH * ",r", [b_s, last_key, oldest_key],
            dtype=gl.float32, is_pure=True, pack=EACH,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            hide_asm(EACH, False), tied(EACH) + EACH * ",r", [b_s, last_key],
            dtype=gl.float32, is_pure=True, pack=EACH,
        )  # fmt: skip


@gluon.jit
def centre(b_s, b_m, scale_log2):
    """P, the maximum that it is relative to, and the factor by which older sums shrink."""
    b_top = gl.convert_layout(gl.max(gl.max(eighths(b_s), 1), 1), b_m.type.layout) * scale_log2
    b_new = gl.where(b_top - b_m > SLACK, b_top, b_m)
    return gl.exp2(b_s * scale_log2 - b_new[:, None]), b_new, gl.exp2(b_m - b_new)


@gluon.jit
def eighths(b_x):
    """[R, N] as [R, N / 8, 8]: what is reduced over axis 1 lies in one thread."""
    return b_x.reshape([b_x.shape[0], b_x.shape[1] // 8, 8])


@gluon.jit
def add_up(b_l, b_p, b_shrink):
    """The partial sums [R, 8] of the rows, with one more block in them."""
    PARTS: gl.constexpr = b_l.type.layout
    b_shrink = gl.convert_layout(b_shrink, gl.SliceLayout(1, PARTS), assert_trivial=True)
    return b_l * b_shrink[:, None] + gl.convert_layout(gl.sum(eighths(b_p), 1), PARTS, assert_trivial=True)


@gluon.jit
def pack(b_p, dtype: gl.constexpr):
    """P as pairs: int32 [R, N / 2]."""
    b_low, b_high = gl.split(b_p.reshape([b_p.shape[0], b_p.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(pack_asm(dtype), "=r,f,f", [b_low, b_high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack(b_pair, dtype: gl.constexpr, OUT: gl.constexpr):
    """Pairs as the left operand of a product: [R, N]. Costs nothing, the registers are the same."""
    b_low = (b_pair & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    b_high = (b_pair >> 16).to(gl.int16).to(dtype, bitcast=True)
    b_p = gl.join(b_low, b_high).reshape([b_pair.shape[0], b_pair.shape[1] * 2])
    return gl.convert_layout(b_p, gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2), assert_trivial=True)


@gluon.jit
def shrink(b_acc, b_shrink):
    """Every row times its factor; a warp whose factors are all 1 does nothing."""
    OUT: gl.constexpr = b_acc.type.layout
    EACH: gl.constexpr = b_acc.shape[0] * b_acc.shape[1] // 128  # numbers in a thread, of two rows in turn
    b_acc, b_by = gl.broadcast(b_acc, gl.convert_layout(b_shrink, gl.SliceLayout(1, OUT))[:, None])
    return gl.inline_asm_elementwise(
        shrink_asm(EACH), tied(EACH) + EACH * ",f", [b_acc, b_by], dtype=gl.float32, is_pure=False, pack=EACH
    )


@gluon.jit
def hold_back(b_l):
    """b_l as it is. What needs it cannot be moved before this, nor can what waits for the matrix units: without, the
    assembler has exponentials wait for P V. The instruction is never executed, since a sum is not NaN unless the
    result is."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred a; setp.nan.f32 a, $4, $4; @a nanosleep.u32 1; }", tied(4), [b_l],
        dtype=gl.float32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.constexpr_function
def tied(n):
    """Constraints of n results, each in the register of its argument."""
    return ",".join(["=f"] * n + [str(i) for i in range(n)])


@gluon.constexpr_function
def shrink_asm(n):
    """Operands: n results, n numbers, n factors. Of four neighbours, two belong to each of the thread's two rows."""
    one = "0f3F800000"
    lines = [
        ".reg .pred a, b;",
        f"setp.neu.f32 a, ${2 * n}, {one}; setp.neu.f32 b, ${2 * n + 2}, {one}; or.pred a, a, b;",
        "vote.sync.any.pred a, a, 0xffffffff; @!a bra.uni SAME;",
        *(f"mul.f32 ${i}, ${n + i}, ${2 * n + i};" for i in range(n)),
        "SAME:",
    ]
    return "{ " + " ".join(lines) + " }"


@gluon.constexpr_function
def hide_asm(n, window):
    """Operands: n results, n scores, n last keys, n oldest keys. See `product_layout` for who has which column."""
    minus_infinity = "0fFF800000"
    lines = [
        ".reg .pred p; .reg .b32 lane, last0, last1, oldest0, oldest1;",
        "mov.u32 lane, %laneid; and.b32 lane, lane, 3; shl.b32 lane, lane, 1;",
        f"sub.s32 last0, ${2 * n}, lane; sub.s32 last1, ${2 * n + 2}, lane;",
    ]
    if window:
        lines.append(f"sub.s32 oldest0, ${3 * n}, lane; sub.s32 oldest1, ${3 * n + 2}, lane;")
    for i in range(n):
        row, column = i // 2 % 2, 8 * (i // 4) + i % 2
        lines.append(f"setp.lt.s32 p, last{row}, {column};")
        if window:
            lines.append(f"setp.ge.or.s32 p, oldest{row}, {column}, p;")
        lines.append(f"@p mov.b32 ${i}, {minus_infinity};")
    return "{ " + " ".join(lines) + " }"


@gluon.constexpr_function
def pack_asm(dtype):
    return f"cvt.rn.{'bf16' if dtype == gl.bfloat16 else 'f16'}x2.f32 $0, $2, $1;"
