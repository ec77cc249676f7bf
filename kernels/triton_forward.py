"""FlashAttention-2 forward over segments, in portable Triton.

One program takes one tile of query rows of one head, walks the keys that it sees and keeps, per row, the running
maximum m and sum l of the exponentials (base 2, the scale folded into the exponent):

    m' = max(m, rowmax S)    P = 2^(S - m')    l' = l 2^(m - m') + rowsum P    acc' = acc 2^(m - m') + P V

    out = acc / l            lse = ln 2 (m + log2 l)

With a cap on scores, S = tanh(scale Q K^T / cap) and cap is the scale. A model has one cap, so kernels are compiled
for it.

Rows are split between warps and keys are not, so warps never exchange partial results (arXiv:2307.08691, section
3.3). A running pair (out, lse) to merge with is where a row starts: acc = out, m = lse / ln 2, l = 1; all in fp32.

Names: p_ pointer, b_ block in registers, o_ offsets inside a block, i_ index; x_strides are the strides of x along
batch, length and heads, or None where x is a tensor descriptor.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .triton_tile import add_dot, dot_rows, head_of, last_key_seen, load_block, locate, run_at, tanh

__all__ = ["forward_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the maximum over nothing; -inf less -inf would be NaN


@triton.jit(do_not_specialize=["ROWS"])
def forward_kernel(
    q, k, v, out, lse, before, tiles, runs, scale, ROWS,
    q_strides, k_strides, v_strides, out_strides, lse_strides, before_strides,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    MERGE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of every tile in `tiles`; with MERGE, `before` and `lse` hold what was seen before."""
    i_tile, i_b, i_h = locate(HEADS)
    i_g = i_h // GROUP
    p_tile = tiles + 3 * i_tile
    row0 = tl.load(p_tile)
    q = head_of(q, q_strides, i_b, i_h)
    k = head_of(k, k_strides, i_b, i_g)
    v = head_of(v, v_strides, i_b, i_g)
    scale_log2 = (CAP if CAP > 0 else scale) * LOG2E

    b_q = load_block(q, q_strides, i_b, i_h, row0, ROWS - row0, D, BLOCK_ROWS, BLOCK_D)
    o_row = tl.arange(0, BLOCK_ROWS)
    o_e = tl.arange(0, BLOCK_E)
    real = o_row < ROWS - row0
    inside = real[:, None] & (o_e < E)[None, :]
    p_lse = lse + i_b.to(tl.int64) * lse_strides[0] + i_h.to(tl.int64) * lse_strides[1] + row0 + o_row
    if MERGE:  # what was seen before weighs 2^m in all
        before = head_of(before, before_strides, i_b, i_h) + row0.to(tl.int64) * before_strides[1]
        b_acc = tl.load(before + o_row[:, None] * before_strides[1] + o_e[None, :], mask=inside, other=0.0)
        b_m = tl.load(p_lse, mask=real, other=-float("inf")) * LOG2E
        b_l = tl.where(b_m == -float("inf"), 0.0, 1.0)
        b_m = tl.maximum(b_m, LOWEST)
    else:
        b_acc = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
        b_m = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
        b_l = tl.zeros([BLOCK_ROWS], tl.float32)
    # Hoisting out of these loops what only some of their blocks use would cost registers in all of them.
    for i_run in tl.range(tl.load(p_tile + 1), tl.load(p_tile + 2), disable_licm=True):
        start, length, head, tail, shift, low, high, window = run_at(runs, i_run)
        for j in tl.range(0, length, BLOCK_KEYS, disable_licm=True):
            b_k = load_block(k, k_strides, i_b, i_g, start + j, length - j, D, BLOCK_KEYS, BLOCK_D)
            b_s = dot_rows(b_q, b_k, PRECISION)
            if CAP > 0:
                b_s, _ = tanh(b_s * (scale / CAP))
            if (j < head) | (j >= tail):
                o_key = tl.arange(0, BLOCK_KEYS)[None, :]
                last_key = last_key_seen(length, shift, low, high, BLOCK_ROWS)
                b_s = tl.where(o_key <= (last_key - j)[:, None], b_s, -float("inf"))
                if WINDOW:
                    b_s = tl.where(o_key > (o_row + shift - window - j)[:, None], b_s, -float("inf"))
            b_x, b_m, b_shrink = centre(b_s, b_m, scale_log2)
            b_v = load_block(v, v_strides, i_b, i_g, start + j, length - j, E, BLOCK_KEYS, BLOCK_E)
            b_acc, b_l = absorb(b_acc, b_l, b_x, b_shrink, b_v, PRECISION)

    seen = b_l != 0.0
    b_lse = tl.where(seen, (b_m + tl.math.log2(b_l)) * LN2, -float("inf"))
    b_acc = b_acc * tl.where(seen, 1.0 / b_l, 0.0)[:, None]
    out = head_of(out, out_strides, i_b, i_h) + row0.to(tl.int64) * out_strides[1]
    tl.store(p_lse, b_lse, mask=real)
    tl.store(out + o_row[:, None] * out_strides[1] + o_e[None, :], b_acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def centre(b_s, b_m, scale_log2):
    """The exponents of P, the new maximum, and the factor by which older sums shrink."""
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
    return b_s * scale_log2 - b_m_new[:, None], b_m_new, tl.math.exp2(b_m - b_m_new)


@triton.jit
def absorb(b_acc, b_l, b_x, b_shrink, b_v, PRECISION: tl.constexpr):
    """acc and l with one more block of values in them."""
    b_p = tl.math.exp2(b_x)
    b_l = b_l * b_shrink + tl.sum(b_p, 1)
    return add_dot(b_acc * b_shrink[:, None], b_p.to(b_v.dtype), b_v, PRECISION), b_l
