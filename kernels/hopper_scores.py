"""From a block of scores to the left operand of P V, as one warpgroup of the Hopper forward does it in registers.

Exponentials take as long as the products of head dim 64, and whatever comes before them delays them. So here a row's
maximum is not looked for:

    P = 2^(S - m)        with m the maximum of the first block of keys that a tile sees

Only when the sum of some P of a row has grown beyond 2^SLACK does a warp take the maximum and compute the block anew,
for such rows alone: what a row gets does not depend on its neighbours. That is a branch, hardly ever taken. Until then
P may be larger than one, which floats carry as well (float16 too, up to 2^15). The step is one piece of assembly,
because only there a warp can branch by itself:

- The sum of a row stays four partial sums, one in each of the lanes that share the row, until its tile is done.
- P is kept as pairs of 16-bit numbers in one register each, as the matrix units take it.

What there is one of for each row and lane is a block [R, 4]. Names as in `triton_forward`.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportCallIssue=false

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_tile import LOWEST

__all__ = ["blank", "hide", "pack", "shrink", "unpack", "unpaired", "weigh"]

SLACK = 12  # log2 of a partial sum


@gluon.jit
def blank(b_s):
    """P in pairs, m and l before any block, in the layouts that follow from those of the scores; these are zero."""
    b_low, _b_high = gl.split(b_s.reshape([b_s.shape[0], b_s.shape[1] // 2, 2]))
    b_l = pick(b_low, 0)
    return b_low.to(gl.int32), b_l + LOWEST, b_l


@gluon.jit
def hide(b_s, last_key, oldest_key, WINDOW: gl.constexpr):
    """Scores with -inf where a row does not see a key: those after `last_key`, and with a window up to `oldest_key`.

    In assembly, because there columns are constants; the compiler keeps them all in registers."""
    EACH: gl.constexpr = b_s.shape[0] * b_s.shape[1] // 128  # numbers in a thread, of two rows in turn
    b_s, last_key = gl.broadcast(b_s, last_key[:, None])
    if WINDOW:
        b_s, oldest_key = gl.broadcast(b_s, oldest_key[:, None])
        return gl.inline_asm_elementwise(
            hide_asm(EACH, True), tied("f", EACH) + 2 * EACH * ",r", [b_s, last_key, oldest_key],
            dtype=gl.float32, is_pure=True, pack=EACH,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            hide_asm(EACH, False), tied("f", EACH) + EACH * ",r", [b_s, last_key],
            dtype=gl.float32, is_pure=True, pack=EACH,
        )  # fmt: skip


@gluon.jit
def weigh(b_s, b_m, b_l, scale_log2, dtype: gl.constexpr, FIRST: gl.constexpr):
    """P in pairs, what it is relative to, the sums with one more block in them, and the factor by which older sums
    shrink. FIRST: take the maximum, this is the first block."""
    ROWS: gl.constexpr = b_s.shape[0]
    KEYS: gl.constexpr = b_s.shape[1]
    EACH: gl.constexpr = ROWS * KEYS // 256  # pairs in a thread, of two rows in turn
    b_low, b_high = gl.split(b_s.reshape([ROWS, KEYS // 2, 2]))
    b_lane = b_low.reshape([ROWS, KEYS // 8, 4])
    b_m = gl.convert_layout(b_m, gl.SliceLayout(1, b_lane.type.layout), assert_trivial=True)
    b_m, _ = gl.broadcast(gl.expand_dims(b_m, 1), b_lane)
    b_m = gl.convert_layout(b_m.reshape([ROWS, KEYS // 2]), b_low.type.layout, assert_trivial=True)
    b_scale = gl.zeros_like(b_low) + scale_log2
    b_pair, b_more = gl.inline_asm_elementwise(
        weigh_asm(EACH, dtype, FIRST), EACH * "=&r," + EACH * "=&f," + (4 * EACH - 1) * "f," + "f",
        [b_low, b_high, b_m, b_scale], dtype=(gl.int32, gl.float32), is_pure=False, pack=EACH,
    )  # fmt: skip
    b_shrink = pick(b_more, 1)
    return b_pair, pick(b_more, 0), b_l * b_shrink + pick(b_more, 2), b_shrink


@gluon.jit
def pick(b_x, N: gl.constexpr):
    """Of [R, 4 n], what each lane has as its N-th number of a row: [R, 4]."""
    ROWS: gl.constexpr = b_x.shape[0]
    HALVINGS: gl.constexpr = bits(b_x.shape[1] // 4)
    for i in gl.static_range(HALVINGS):
        b_x = b_x.reshape([ROWS, b_x.shape[1] // 8, 2, 4]).permute((0, 1, 3, 2))
        b_even, b_odd = gl.split(b_x)
        b_x = (b_odd if (N >> i) & 1 else b_even).reshape([ROWS, b_even.shape[1] * 4])
    return b_x


@gluon.jit
def pack(b_p, dtype: gl.constexpr):
    """Numbers as pairs: int32 [R, N / 2]."""
    b_low, b_high = gl.split(b_p.reshape([b_p.shape[0], b_p.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(pack_asm(dtype), "=r,f,f", [b_low, b_high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack(b_pair, dtype: gl.constexpr, OUT: gl.constexpr):
    """Pairs as the left operand of a product: [R, N]. Costs nothing, the registers are the same."""
    b_p = unpaired(b_pair, dtype)
    return gl.convert_layout(b_p, gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2), assert_trivial=True)


@gluon.jit
def unpaired(b_pair, dtype: gl.constexpr):
    """[R, N] of pairs [R, N / 2]."""
    b_low = (b_pair & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    b_high = (b_pair >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.join(b_low, b_high).reshape([b_pair.shape[0], b_pair.shape[1] * 2])


@gluon.jit
def shrink(b_acc, b_shrink):
    """Every row times its factor; a warp whose factors are all 1 does nothing."""
    OUT: gl.constexpr = b_acc.type.layout
    ROWS: gl.constexpr = b_acc.shape[0]
    BLOCK_E: gl.constexpr = b_acc.shape[1]
    EACH: gl.constexpr = ROWS * BLOCK_E // 128  # numbers in a thread, of two rows in turn
    b_lane = b_acc.reshape([ROWS, BLOCK_E // 8, 4, 2])
    LANES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, b_lane.type.layout))
    b_by = gl.convert_layout(b_shrink, LANES, assert_trivial=True)
    b_lane, b_by = gl.broadcast(b_lane, gl.expand_dims(gl.expand_dims(b_by, 1), 3))
    b_lane = gl.inline_asm_elementwise(
        shrink_asm(EACH), tied("f", EACH) + EACH * ",f", [b_lane, b_by], dtype=gl.float32, is_pure=False, pack=EACH
    )
    return gl.convert_layout(b_lane.reshape([ROWS, BLOCK_E]), OUT, assert_trivial=True)


@gluon.constexpr_function
def to_pair(dtype):
    return f"cvt.rn.{'bf16' if dtype == gl.bfloat16 else 'f16'}x2.f32"


@gluon.constexpr_function
def pack_asm(dtype):
    return f"{to_pair(dtype)} $0, $2, $1;"


@gluon.constexpr_function
def bits(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def tied(kind, n):
    """Constraints of n results of a kind, each in the register of its argument."""
    return ",".join([f"={kind}"] * n + [str(i) for i in range(n)])


@gluon.constexpr_function
def shrink_asm(n):
    """Operands: n results, n numbers, n factors. Of four neighbours, two belong to each of the thread's two rows."""
    lines = [
        ".reg .pred a, b;",
        f"setp.neu.f32 a, ${2 * n}, {ONE}; setp.neu.f32 b, ${2 * n + 2}, {ONE}; or.pred a, a, b;",
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


ONE = "0f3F800000"
LIMIT = f"0f{struct.pack('>f', 2.0**SLACK).hex().upper()}"
BOTH = (0, 1)  # rows of a thread


@gluon.constexpr_function
def weigh_asm(n, dtype, first):
    """Operands: n pairs of P; n results, of which the first are m, the factor and the sum, each of both rows; n lower
    and n higher scores of the pairs; n times m; n times the scale. Rows take turns."""
    pairs, results, lower, higher, m = ([f"${k * n + i}" for i in range(n)] for k in range(5))
    scale, scores, convert = f"${5 * n}", (lower, higher), to_pair(dtype)

    def each_row(line: str) -> list[str]:
        return [line.format(r=r, m=m[r], new=results[r], factor=results[2 + r], sum=results[4 + r]) for r in BOTH]

    def exponentials(r: int, condition: str = "") -> list[str]:
        lines = []
        for i in range(r, n, 2):
            for part, of in enumerate(scores):
                add = f"add.f32 s{r}{part}, s{r}{part}, p{part};" if i > r else f"mov.f32 s{r}{part}, p{part};"
                lines.append(
                    f"fma.rn.f32 p{part}, {of[i]}, {scale}, minus{r}; ex2.approx.ftz.f32 p{part}, p{part}; {add}"
                )
            lines.append(f"{condition}{convert} {pairs[i]}, p1, p0;")
        return [*lines, f"add.f32 s{r}0, s{r}0, s{r}1;"]

    def over_lanes(x: str) -> list[str]:
        return [
            line
            for distance in (1, 2)
            for line in each_row(f"shfl.sync.bfly.b32 t, {x}, {distance}, 31, 0xffffffff; max.f32 {x}, {x}, t;")
        ]

    lines = [
        ".reg .pred a, big0, big1; .reg .f32 t, p0, p1, s00, s01, s10, s11;",
        ".reg .f32 minus0, minus1, top0, top1, most0, most1;",
        *each_row("neg.f32 minus{r}, {m}; mov.f32 {new}, {m}; mov.f32 {factor}, " + ONE + ";"),
    ]
    if first:
        lines += ["setp.eq.u32 big0, 0, 0; setp.eq.u32 big1, 0, 0;"]
    else:
        lines += exponentials(0) + exponentials(1)
        lines += each_row("mov.f32 {sum}, s{r}0; mov.f32 most{r}, s{r}0; setp.gt.f32 big{r}, s{r}0, " + LIMIT + ";")
        lines += ["or.pred a, big0, big1; vote.sync.any.pred a, a, 0xffffffff; @!a bra.uni DONE;"]
        lines += over_lanes("most{r}") + each_row("setp.gt.f32 big{r}, most{r}, " + LIMIT + ";")
    for r in BOTH:
        lines += [f"mov.f32 top{r}, {lower[r]};"]
        lines += [f"max.f32 top{r}, top{r}, {of[i]};" for i in range(r, n, 2) for of in scores]
    lines += over_lanes("top{r}")
    lines += each_row("mul.f32 top{r}, top{r}, " + scale + "; max.f32 top{r}, top{r}, {m};")
    lines += each_row("@big{r} mov.f32 {new}, top{r}; neg.f32 minus{r}, {new};")
    lines += each_row("add.f32 t, {m}, minus{r}; ex2.approx.ftz.f32 {factor}, t;")
    for r in BOTH:
        lines += exponentials(r, "" if first else f"@big{r} ")
    lines += each_row("@big{r} mov.f32 {sum}, s{r}0;")
    return "{ " + " ".join([*lines, "DONE:"]) + " }"
