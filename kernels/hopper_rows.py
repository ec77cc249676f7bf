"""Rows of out and lse on their way from memory to the registers of a warpgroup of the Hopper forward, and back.

Heads are counted through all sequences: head h of sequence b is i_bh = b HEADS + h. Offsets are 64-bit. Names as in
`triton_forward`.

Which rows and columns a thread has follows from its lane and its warp. Of a range (`gl.arange`) the compiler would keep
what the thread makes of them from the start of the kernel to its end, in registers that nobody has. So a lane is asked
for anew wherever rows come or go; what follows from the warp alone takes none.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportCallIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_scores import pack, unpaired
from .hopper_tile import CROWDED, LN2, LOG2E, LOWEST, read_anew

__all__ = ["finish", "sight", "start"]


@gluon.jit
def start(
    b_acc, b_m, result, i_bh, row0, LENGTH,
    HEADS: gl.constexpr, E: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """acc, m and l of rows that have seen what out and lse say, or nothing. They lie as `b_acc` and `b_m` do."""
    _out, lse, before, _out_strides, lse_strides, before_strides = result
    ROWS: gl.constexpr = b_acc.shape[0]
    BLOCK_E: gl.constexpr = b_acc.shape[1]
    OUT: gl.constexpr = b_acc.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, b_m.type.layout)
    b_zero = gl.zeros_like(b_m)
    if MERGE:
        lane = read_anew("%laneid")
        p_before = rows_at(before, before_strides, i_bh, row0, lane, HEADS, ROWS, BLOCK_E, OUT)
        p_lse = sums_at(lse, lse_strides, i_bh, row0, lane, HEADS, ROWS, ROW)
        b_acc = gl.load(p_before, mask=inside(LENGTH - row0, lane, ROWS, E, BLOCK_E, OUT), other=0.0)
        b_m = gl.load(p_lse, mask=rows_of(lane, ROWS, ROW) < LENGTH - row0, other=-float("inf")) * LOG2E
        # That weighs 2^m in all, a quarter of it in each lane's sum.
        b_l = gl.where(b_m == -float("inf"), 0.0, 0.25)
        return b_acc, b_zero + gl.maximum(b_m, LOWEST)[:, None], b_zero + b_l[:, None]
    else:
        return gl.zeros_like(b_acc), b_zero + LOWEST, b_zero


@gluon.jit
def finish(
    b_acc, b_m, b_l, result, error, i_bh, row0, LENGTH, HEADS: gl.constexpr, E: gl.constexpr, WAIT: gl.constexpr
):
    """Writes rows of out and lse."""
    out, lse, _before, out_strides, lse_strides, _before_strides = result
    ROWS: gl.constexpr = b_acc.shape[0]
    BLOCK_E: gl.constexpr = b_acc.shape[1]
    OUT: gl.constexpr = b_acc.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, b_m.type.layout)
    if WAIT:  # keys may not have been there; asked first, since the answer takes as long as what follows
        late = gl.load(error, volatile=True)
    lane = read_anew("%laneid")
    b_weight = gl.sum(b_l, 1)
    seen = b_weight != 0.0
    b_lse = gl.where(seen, (gl.max(b_m, 1) + gl.log2(b_weight)) * LN2, -float("inf"))
    b_inverse = gl.where(seen, 1.0 / b_weight, 0.0)
    if WAIT:
        poison = gl.where(late != 0, float("nan"), 0.0)
        b_lse += poison
        b_inverse += poison
    p_lse = sums_at(lse, lse_strides, i_bh, row0, lane, HEADS, ROWS, ROW)
    real = (rows_of(lane, ROWS, ROW) < LENGTH - row0) & (lane & 3 == 0)
    # As [R, 4], one for each lane: of a row that lanes share, Triton asks again which of them stores it.
    p_lse, _ = gl.broadcast(p_lse[:, None], b_l)
    gl.store(p_lse, b_lse[:, None], mask=real[:, None])
    b_acc = b_acc * gl.convert_layout(b_inverse, gl.SliceLayout(1, OUT))[:, None]
    b_out = side_by_side(b_acc, out.dtype.element_ty)
    WIDE: gl.constexpr = b_out.type.layout
    p_out = rows_at(out, out_strides, i_bh, row0, lane, HEADS, ROWS, BLOCK_E, WIDE)
    gl.store(p_out, b_out, mask=inside(LENGTH - row0, lane, ROWS, E, BLOCK_E, WIDE))


@gluon.jit
def side_by_side(b_x, dtype: gl.constexpr):
    """Results in their dtype, as they are stored. Of 16 bits, each of the four lanes of a row has two columns in every
    eight, and to store them takes as long as 16 bytes would: so lanes trade, until each has eight side by side."""
    if dtype.primitive_bitwidth == 32:
        return b_x
    else:
        ROWS: gl.constexpr = b_x.shape[0]
        COLUMNS: gl.constexpr = b_x.shape[1]
        EACH: gl.constexpr = ROWS * COLUMNS // 256  # pairs in a thread, of two rows in turn
        b_pair = gl.inline_asm_elementwise(
            trade_asm(EACH), EACH * "=&r," + (EACH - 1) * "r," + "r", [pack(b_x, dtype)],
            dtype=gl.int32, is_pure=True, pack=EACH,
        )  # fmt: skip
        b_pair = b_pair.reshape([ROWS, COLUMNS // 32, 4, 4]).permute((0, 1, 3, 2)).reshape([ROWS, COLUMNS // 2])
        # The same registers in another order, that of columns.
        return gl.convert_layout(unpaired(b_pair, dtype), wide_layout(ROWS, COLUMNS))


@gluon.constexpr_function
def wide_layout(rows, columns):
    """As `product_layout`, but each of the four lanes of a row has eight columns side by side."""
    far = [[0, 1 << i] for i in range(5, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], *far, [8, 0]], lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[rows, columns],
    )  # fmt: skip


@gluon.constexpr_function
def trade_asm(n):
    """Operands: n results, n pairs. Of four pairs of a row, the i-th of lane j becomes the j-th of lane i: first the
    lower bits of i and j change places, then the upper ones."""
    lines = [
        ".reg .pred upper0, upper1; .reg .b32 lane, give;",
        "mov.u32 lane, %laneid; and.b32 give, lane, 1; setp.ne.u32 upper0, give, 0;",
        "and.b32 give, lane, 2; setp.ne.u32 upper1, give, 0;",
        *(f"mov.b32 ${i}, ${n + i};" for i in range(n)),
    ]
    for bit in (0, 1):
        for i in range(n):
            if i >> 1 >> bit & 1:
                continue
            low, high = f"${i}", f"${i + (2 << bit)}"  # rows take turns
            lines += [
                f"selp.b32 give, {low}, {high}, upper{bit}; shfl.sync.bfly.b32 give, give, {1 << bit}, 31, 0xffffffff;",
                f"selp.b32 {low}, give, {low}, upper{bit}; selp.b32 {high}, {high}, give, upper{bit};",
            ]
    return "{ " + " ".join(lines) + " }"


@gluon.jit
def sight(length, shift, low, high, window, ROW0: gl.constexpr, ROWS: gl.constexpr, ROW: gl.constexpr):
    """The last key of a run that each row sees, -1 for none, and the last one that its window has left behind."""
    # Where a register is left for these rows, the assembler would rather spill something else than ask for a lane.
    o_row = ROW0 + (rows_of(read_anew("%laneid"), ROWS, ROW) if CROWDED else gl.arange(0, ROWS, layout=ROW))
    last_key = gl.where((o_row >= low) & (o_row < high), gl.minimum(o_row + shift, length - 1), -1)
    return last_key, o_row + shift - window


@gluon.jit
def rows_of(lane, ROWS: gl.constexpr, ROW: gl.constexpr):
    """`gl.arange(0, ROWS, layout=ROW)`: eight rows of a warp side by side, each in four lanes."""
    return (gl.arange(0, ROWS, layout=ROW) & -8) + (lane >> 2)


@gluon.jit
def columns_of(lane, BLOCK_E: gl.constexpr, LAYOUT: gl.constexpr):
    """`gl.arange(0, BLOCK_E, layout=gl.SliceLayout(0, LAYOUT))`: a few columns side by side in each of four lanes."""
    EACH: gl.constexpr = columns_of_a_lane(LAYOUT)
    o_e = (gl.arange(0, BLOCK_E, layout=gl.SliceLayout(0, LAYOUT)) & ~(3 * EACH)) + (lane & 3) * EACH
    return gl.max_contiguous(gl.multiple_of(o_e, EACH), EACH)


@gluon.constexpr_function
def columns_of_a_lane(layout):
    """See `wide_layout` and `product_layout`."""
    return layout.lane_bases[0][1] if isinstance(layout, gl.DistributedLinearLayout) else 2


@gluon.jit
def rows_at(
    x, strides, i_bh, row0, lane, HEADS: gl.constexpr, ROWS: gl.constexpr, BLOCK_E: gl.constexpr, LAYOUT: gl.constexpr
):
    """Pointers to rows of one head of x [B, L, H, E]."""
    i_b = (i_bh // HEADS).to(gl.int64)
    i_h = (i_bh % HEADS).to(gl.int64)
    x += i_b * wide(strides[0]) + row0.to(gl.int64) * wide(strides[1]) + i_h * wide(strides[2])
    o_row = rows_of(lane, ROWS, gl.SliceLayout(1, LAYOUT))
    o_e = columns_of(lane, BLOCK_E, LAYOUT)
    return x + o_row[:, None] * strides[1] + o_e[None, :]


@gluon.jit
def sums_at(lse, strides, i_bh, row0, lane, HEADS: gl.constexpr, ROWS: gl.constexpr, ROW: gl.constexpr):
    """Pointers to rows of one head of lse [B, H, L]."""
    i_b = (i_bh // HEADS).to(gl.int64)
    i_h = (i_bh % HEADS).to(gl.int64)
    return lse + i_b * wide(strides[0]) + i_h * wide(strides[1]) + row0 + rows_of(lane, ROWS, ROW)


@gluon.jit
def wide(step):
    """A stride in 64 bits. It is not negative, so the upper ones are zero, and no register has to keep them."""
    step = gl.to_tensor(step)
    return step.to(gl.uint32).to(gl.int64) if step.dtype == gl.int32 else step.to(gl.int64)


@gluon.jit
def inside(rows, lane, ROWS: gl.constexpr, E: gl.constexpr, BLOCK_E: gl.constexpr, LAYOUT: gl.constexpr):
    """Which places of a block are rows and columns of the tensor."""
    real = (rows_of(lane, ROWS, gl.SliceLayout(1, LAYOUT)) < rows)[:, None]
    if E < BLOCK_E:
        return real & (columns_of(lane, BLOCK_E, LAYOUT) < E)[None, :]
    else:
        return real
