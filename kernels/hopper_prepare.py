"""What launches of the Hopper backward begin with: lse and delta in pieces, for its matrix units, and dQ from zero.

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

__all__ = ["DELTA", "PIECES", "WEIGHT_0", "WEIGHT_1", "WEIGHT_2", "prepare_kernel"]

WEIGHT_0, WEIGHT_1, WEIGHT_2 = tl.constexpr(2.0**15), tl.constexpr(2.0**4), tl.constexpr(2.0**-7)
PIECES = tl.constexpr(16)  # numbers of a row: as many columns as a matrix instruction takes
DELTA = tl.constexpr(8)  # where those of delta begin, after those of lse
HIGHEST = tl.constexpr(2.0**30)


@triton.jit(do_not_specialize=["TOTAL"])
def prepare_kernel(lse, delta, pieces, dq, scale, TOTAL, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """pieces [TOTAL, PIECES] of lse and delta [TOTAL], and zeros in dq [TOTAL, D], unless it is None. A row that sees
    nothing, lse -inf, gets P = 0."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = o_row < TOTAL
    b_lse = tl.load(lse + o_row, mask=valid, other=0.0)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse) / scale
    b_lse = tl.minimum(tl.maximum(b_lse, -HIGHEST), HIGHEST)
    b_delta = tl.load(delta + o_row, mask=valid, other=0.0)
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
    if dq is not None:
        o_d = tl.arange(0, BLOCK_D)[None, :]
        tl.store(dq + o_row[:, None] * D + o_d, tl.zeros([BLOCK, BLOCK_D], tl.float32), mask=valid[:, None] & (o_d < D))
