"""What the Triton kernels of both directions share: where a program stands, its runs, how a block is read."""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

__all__ = ["add_dot", "dot_rows", "head_of", "last_key_seen", "load_block", "locate", "run_at", "tanh"]


@triton.jit
def locate(HEADS: tl.constexpr):
    """(tile, batch, head) of this program, in a grid of (heads of one section, tiles, sections).

    Programs start in this order: one section after the other, in it the longest tiles first, and for one tile the
    heads that share keys and values side by side. A section is as many heads as the L2 cache can hold the other
    operands of (`launch.section`).
    """
    i_bh = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    return tl.program_id(1), i_bh // HEADS, i_bh % HEADS


@triton.jit
def run_at(runs, i_run):
    """start, length, head, tail, shift, low, high, window of one run (`tiles.Work`)."""
    p_run = runs + 8 * i_run
    start, length, head, tail = tl.load(p_run), tl.load(p_run + 1), tl.load(p_run + 2), tl.load(p_run + 3)
    shift, low, high, window = tl.load(p_run + 4), tl.load(p_run + 5), tl.load(p_run + 6), tl.load(p_run + 7)
    return start, length, head, tail, shift, low, high, window


@triton.jit
def last_key_seen(length, shift, low, high, BLOCK: tl.constexpr):
    """The last key of a run that each row of a query tile sees, -1 for none: [BLOCK]."""
    o_row = tl.arange(0, BLOCK)
    return tl.where((o_row >= low) & (o_row < high), tl.minimum(o_row + shift, length - 1), -1)


@triton.jit
def head_of(x, strides, i_b, i_h):
    """Where one head of x [B, L, H, D] begins. A descriptor, which comes without strides, stays what it is."""
    if strides is None:
        return x
    else:
        return x + i_b.to(tl.int64) * strides[0] + i_h.to(tl.int64) * strides[2]


@triton.jit
def load_block(x, strides, i_b, i_h, start, valid, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D]: rows `start` and on of one head (x as `head_of` gives it), zero from column D on.

    By descriptor, rows past the end of the tensor are zero. By pointer, rows from `valid` on are zero, unless `valid`
    is None.
    """
    if strides is None:
        return x.load([i_b, i_h, start, 0]).reshape([BLOCK, BLOCK_D])
    else:
        o_row = tl.arange(0, BLOCK)[:, None]
        o_d = tl.arange(0, BLOCK_D)[None, :]
        p_x = x + start.to(tl.int64) * strides[1] + o_row * strides[1] + o_d
        if valid is None and D == BLOCK_D:
            return tl.load(p_x)
        elif valid is None:
            return tl.load(p_x, mask=o_d < D, other=0.0)
        elif D == BLOCK_D:
            return tl.load(p_x, mask=o_row < valid, other=0.0)
        else:
            return tl.load(p_x, mask=(o_row < valid) & (o_d < D), other=0.0)


@triton.jit
def dot_rows(b_a, b_b, PRECISION: tl.constexpr):
    """[M, N]: every row of a [M, D] times every row of b [N, D].

    In fp32 products are summed one after the other, and the rounding errors of such a chain grow with its length: a
    wide product is the sum of four quarters.
    """
    if b_a.dtype == tl.float32 and b_a.shape[1] > 128:
        b_a0, b_a1 = halves(b_a)
        b_b0, b_b1 = halves(b_b)
        return dot_halves(b_a0, b_b0, PRECISION) + dot_halves(b_a1, b_b1, PRECISION)
    else:
        return tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)


@triton.jit
def dot_halves(b_a, b_b, PRECISION: tl.constexpr):
    """`dot_rows` as the sum of two halves."""
    b_a0, b_a1 = halves(b_a)
    b_b0, b_b1 = halves(b_b)
    first = tl.dot(b_a0, tl.trans(b_b0), input_precision=PRECISION)
    return first + tl.dot(b_a1, tl.trans(b_b1), input_precision=PRECISION)


@triton.jit
def tanh(b_x):
    """(1 - e) / (1 + e) with e = exp(-2 |x|), or near 0, where that cancels, the first terms of a series; and its slope
    4 e / (1 + e)^2, which is 1 - tanh^2 without cancelling for large x."""
    b_e = tl.math.exp2(tl.abs(b_x) * -2.8853900817779268)
    b_t = (1.0 - b_e) / (1.0 + b_e)
    b_t = tl.where(b_x < 0.0, -b_t, b_t)
    b_y = b_x * b_x
    b_series = -0.33333333 + b_y * (0.13333333 + b_y * (-0.05396825 + b_y * 0.02186949))
    b_t = tl.where(b_y < 0.0625, b_x + b_x * b_y * b_series, b_t)
    return b_t, 4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))


@triton.jit
def halves(b_x):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(b_x, [b_x.shape[0], 2, b_x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def add_dot(b_sum, b_a, b_b, PRECISION: tl.constexpr):
    """sum + a b. For the same reason, in fp32 the products of a block are summed by themselves first."""
    if b_a.dtype == tl.float32:
        return b_sum + tl.dot(b_a, b_b, input_precision=PRECISION)
    else:
        return tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)
