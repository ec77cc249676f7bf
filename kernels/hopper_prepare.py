"""What launches of the Hopper backward begin with: lse and delta in pieces, for its matrix units, and dQ from zero.
All of it in one launch, because each reads or writes about as much as q has.

Every score of a row takes -lse / scale of that row, every element of dO V^T takes -delta. As vectors in shared memory
they cost a quarter of what all products of a block read, because each lane of each warp reads its own copy. So they are
written as sums of three 16-bit numbers,

    x = WEIGHT_0 a + WEIGHT_1 b + WEIGHT_2 c      a = x / WEIGHT_0 rounded, b = what is left / WEIGHT_1 rounded, ...

and a product over 16 more columns, weights times pieces, adds them up in fp32. Weights that differ keep the pieces in
the range of fp16 for x up to 2^30, and three pieces of bfloat16 hold the 24 bits of fp32.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .triton_tile import head_of, load_block

__all__ = ["DELTA", "PIECES", "WEIGHT_0", "WEIGHT_1", "WEIGHT_2", "prepare_kernel"]

WEIGHT_0, WEIGHT_1, WEIGHT_2 = tl.constexpr(2.0**15), tl.constexpr(2.0**4), tl.constexpr(2.0**-7)
PIECES = tl.constexpr(16)  # numbers of a row: as many columns as a matrix instruction takes
DELTA = tl.constexpr(8)  # where those of delta begin, after those of lse
HIGHEST = tl.constexpr(2.0**30)


@triton.jit(do_not_specialize=["ROWS"])
def prepare_kernel(
    dout, out, lse, delta, pieces, dq, scale, ROWS, dout_strides, out_strides,
    HEADS: tl.constexpr, LOST: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """pieces [B * HEADS + LOST, ROWS, PIECES] of lse [B, HEADS, ROWS] and of delta, those of the last LOST heads NaN,
    for who must not come to numbers; and zeros in dq [B, HEADS, ROWS, D]; all contiguous.

    With dout and out, [B, ROWS, HEADS, E], delta is rowsum(dout * out), less `delta` if there is one; without them it
    is `delta`. Without dq nothing is zeroed. A row that sees nothing, lse -inf, gets P = 0. Programs that run side by
    side take neighbouring heads of the same rows.
    """
    i_b, i_h = tl.program_id(1), tl.program_id(0) % HEADS
    row0 = tl.program_id(0) // HEADS * BLOCK
    o_block = tl.arange(0, BLOCK)
    valid = o_block < ROWS - row0
    o_row = (i_b.to(tl.int64) * HEADS + i_h) * ROWS + row0 + o_block
    b_lse = tl.load(lse + o_row, mask=valid, other=0.0)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse) / scale
    b_lse = tl.minimum(tl.maximum(b_lse, -HIGHEST), HIGHEST)
    b_delta = tl.zeros([BLOCK], tl.float32)
    if delta is not None:
        b_delta = tl.load(delta + o_row, mask=valid, other=0.0)
    if dout is not None:
        dout, out = head_of(dout, dout_strides, i_b, i_h), head_of(out, out_strides, i_b, i_h)
        b_do = load_block(dout, dout_strides, i_b, i_h, row0, ROWS - row0, E, BLOCK, BLOCK_E).to(tl.float32)
        b_out = load_block(out, out_strides, i_b, i_h, row0, ROWS - row0, E, BLOCK, BLOCK_E).to(tl.float32)
        b_delta = tl.sum(b_do * b_out, 1) - b_delta
    o_column = tl.arange(0, PIECES)
    b_x = -tl.where((o_column < DELTA)[None, :], b_lse[:, None], b_delta[:, None])
    dtype = pieces.dtype.element_ty
    b_0 = (b_x / WEIGHT_0).to(dtype)
    b_x -= b_0.to(tl.float32) * WEIGHT_0
    b_1 = (b_x / WEIGHT_1).to(dtype)
    b_x -= b_1.to(tl.float32) * WEIGHT_1
    b_2 = (b_x / WEIGHT_2).to(dtype)
    i_piece = (o_column % DELTA)[None, :]
    b_piece = tl.where(i_piece == 0, b_0, tl.where(i_piece == 1, b_1, tl.where(i_piece == 2, b_2, tl.zeros_like(b_0))))
    tl.store(pieces + o_row[:, None] * PIECES + o_column[None, :], b_piece, mask=valid[:, None])
    if (i_b == 0) & (i_h < LOST):
        o_lost = (tl.num_programs(1) * HEADS + i_h).to(tl.int64) * ROWS + row0 + o_block
        b_lost = tl.full([BLOCK, PIECES], float("nan"), tl.float32).to(dtype)
        tl.store(pieces + o_lost[:, None] * PIECES + o_column[None, :], b_lost, mask=valid[:, None])
    if dq is not None:
        o_d = tl.arange(0, BLOCK_D)[None, :]
        b_zero = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        tl.store(dq + o_row[:, None] * D + o_d, b_zero, mask=valid[:, None] & (o_d < D))
