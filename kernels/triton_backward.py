"""FlashAttention-2 backward over segments, in portable Triton: dK and dV by key tile, dQ by query tile.

With the final lse and delta = rowsum(dO * O) every block stands for itself (arXiv:2307.08691, section 3.1.2):

    P = exp(scale Q K^T - lse)    dS = P (dO V^T - delta)    dV = P^T dO    dK = scale dS^T Q    dQ = scale dS K

With a cap on scores, s = cap tanh(scale q k / cap), dS takes the slope of the tanh, 1 - (s / cap)^2, as a factor.

A program of `key_gradients_kernel` owns one tile of one key/value head, walks the rows that see it and takes the
query heads that share the head in turn; a program of `query_gradients_kernel` owns one tile of query rows and walks
keys. Nobody else writes to a tile and every sum has a fixed order, so results are bit-equal run to run. The price is
that scores and dO V^T are computed twice: seven products instead of five.

Two orders matter for speed. dO V^T is issued before the exponentials, which then run beside it. And the first kernel
computes transposed blocks, [keys, rows], so that P^T and dS^T already lie where their products want their left
operand. Names as in `triton_forward.py`.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .triton_tile import add_dot, dot_rows, head_of, last_key_seen, load_block, locate, run_at, tanh

__all__ = ["delta_kernel", "key_gradients_kernel", "query_gradients_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["ROWS"])
def delta_kernel(
    dout, out, delta, ROWS, dout_strides, out_strides,
    HEADS: tl.constexpr, E: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """delta, contiguous [B, HEADS, ROWS]. Programs that run side by side take neighbouring heads of the same rows."""
    i_b, i_h = tl.program_id(1), tl.program_id(0) % HEADS
    row0 = tl.program_id(0) // HEADS * BLOCK_ROWS
    dout, out = head_of(dout, dout_strides, i_b, i_h), head_of(out, out_strides, i_b, i_h)
    b_do = load_block(dout, dout_strides, i_b, i_h, row0, ROWS - row0, E, BLOCK_ROWS, BLOCK_E).to(tl.float32)
    b_out = load_block(out, out_strides, i_b, i_h, row0, ROWS - row0, E, BLOCK_ROWS, BLOCK_E).to(tl.float32)
    o_row = tl.arange(0, BLOCK_ROWS)
    p_delta = delta + (i_b.to(tl.int64) * HEADS + i_h) * ROWS + row0 + o_row
    tl.store(p_delta, tl.sum(b_do * b_out, 1), mask=o_row < ROWS - row0)


@triton.jit(do_not_specialize=["ROWS", "KEYS"])
def key_gradients_kernel(
    q, k, v, dout, lse, delta, dk, dv, tiles, runs, scale, ROWS, KEYS,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ADD: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of every tile in `tiles`; lse and delta are contiguous [B, H, ROWS]."""
    i_tile, i_b, i_g = locate(HEADS // GROUP)
    p_tile = tiles + 3 * i_tile
    key0 = tl.load(p_tile)
    k = head_of(k, k_strides, i_b, i_g)
    v = head_of(v, v_strides, i_b, i_g)
    lse += i_b.to(tl.int64) * HEADS * ROWS
    delta += i_b.to(tl.int64) * HEADS * ROWS
    scale_log2 = (CAP if CAP > 0 else scale) * LOG2E

    o_row = tl.arange(0, BLOCK_ROWS)
    o_key = tl.arange(0, BLOCK_KEYS)
    b_k = load_block(k, k_strides, i_b, i_g, key0, KEYS - key0, D, BLOCK_KEYS, BLOCK_D)
    b_v = load_block(v, v_strides, i_b, i_g, key0, KEYS - key0, E, BLOCK_KEYS, BLOCK_E)
    b_dk = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_KEYS, BLOCK_E], tl.float32)
    # Two loops: a row's lse and delta lie in many registers here, and a bounds check takes as many again.
    for MASKED in tl.static_range(2):
        parts = 1 + MASKED
        for i_part in tl.range(tl.load(p_tile + 1) * parts, tl.load(p_tile + 2) * parts, disable_licm=True):
            start, length, shift, low, high, window = part_at(runs, i_part, MASKED)
            first_row = tl.where((o_key >= low) & (o_key < high), o_key - shift, length)
            for i in tl.range(tl.cdiv(length, BLOCK_ROWS) * GROUP, disable_licm=True):
                i_h = i_g * GROUP + i % GROUP
                j = i // GROUP * BLOCK_ROWS
                valid = length - j if MASKED else None
                q_head = head_of(q, q_strides, i_b, i_h)
                dout_head = head_of(dout, dout_strides, i_b, i_h)
                b_q = load_block(q_head, q_strides, i_b, i_h, start + j, valid, D, BLOCK_ROWS, BLOCK_D)
                b_do = load_block(dout_head, dout_strides, i_b, i_h, start + j, valid, E, BLOCK_ROWS, BLOCK_E)
                b_lse = load_rows(lse + i_h.to(tl.int64) * ROWS + start + j, valid, float("inf"), BLOCK_ROWS)
                b_s = dot_rows(b_k, b_q, PRECISION)
                if CAP > 0:
                    b_s, b_slope = tanh(b_s * (scale / CAP))
                b_dp = dot_rows(b_v, b_do, PRECISION)
                b_p = tl.math.exp2(b_s * scale_log2 - (b_lse * LOG2E)[None, :])
                if MASKED:
                    b_p = tl.where(o_row[None, :] >= (first_row - j)[:, None], b_p, 0.0)
                    if WINDOW:
                        b_p = tl.where(o_row[None, :] < (o_key - shift + window - j)[:, None], b_p, 0.0)
                b_dv = add_dot(b_dv, b_p.to(b_do.dtype), b_do, PRECISION)
                b_delta = load_rows(delta + i_h.to(tl.int64) * ROWS + start + j, valid, 0.0, BLOCK_ROWS)
                b_ds = b_p * (b_dp - b_delta[None, :])
                if CAP > 0:
                    b_ds *= b_slope
                b_dk = add_dot(b_dk, b_ds.to(b_q.dtype), b_q, PRECISION)

    o_d = tl.arange(0, BLOCK_D)
    o_e = tl.arange(0, BLOCK_E)
    valid = (o_key < KEYS - key0)[:, None]
    dk = head_of(dk, dk_strides, i_b, i_g) + key0.to(tl.int64) * dk_strides[1]
    dv = head_of(dv, dv_strides, i_b, i_g) + key0.to(tl.int64) * dv_strides[1]
    put(dv + o_key[:, None] * dv_strides[1] + o_e[None, :], b_dv, valid & (o_e < E)[None, :], ADD)
    put(dk + o_key[:, None] * dk_strides[1] + o_d[None, :], b_dk * scale, valid & (o_d < D)[None, :], ADD)


@triton.jit(do_not_specialize=["ROWS"])
def query_gradients_kernel(
    q, k, v, dout, lse, delta, dq, tiles, runs, scale, ROWS,
    q_strides, k_strides, v_strides, dout_strides, dq_strides,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ADD: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of every tile in `tiles`; lse and delta are contiguous [B, H, ROWS]."""
    i_tile, i_b, i_h = locate(HEADS)
    i_g = i_h // GROUP
    p_tile = tiles + 3 * i_tile
    row0 = tl.load(p_tile)
    q = head_of(q, q_strides, i_b, i_h)
    k = head_of(k, k_strides, i_b, i_g)
    v = head_of(v, v_strides, i_b, i_g)
    dout = head_of(dout, dout_strides, i_b, i_h)
    lse += (i_b.to(tl.int64) * HEADS + i_h) * ROWS
    delta += (i_b.to(tl.int64) * HEADS + i_h) * ROWS
    scale_log2 = (CAP if CAP > 0 else scale) * LOG2E

    o_row = tl.arange(0, BLOCK_ROWS)
    b_q = load_block(q, q_strides, i_b, i_h, row0, ROWS - row0, D, BLOCK_ROWS, BLOCK_D)
    b_do = load_block(dout, dout_strides, i_b, i_h, row0, ROWS - row0, E, BLOCK_ROWS, BLOCK_E)
    b_lse = load_rows(lse + row0, ROWS - row0, float("inf"), BLOCK_ROWS) * LOG2E
    b_delta = load_rows(delta + row0, ROWS - row0, 0.0, BLOCK_ROWS)
    b_dq = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for i_run in tl.range(tl.load(p_tile + 1), tl.load(p_tile + 2), disable_licm=True):
        start, length, head, tail, shift, low, high, window = run_at(runs, i_run)
        for j in tl.range(0, length, BLOCK_KEYS, disable_licm=True):
            b_k = load_block(k, k_strides, i_b, i_g, start + j, length - j, D, BLOCK_KEYS, BLOCK_D)
            b_v = load_block(v, v_strides, i_b, i_g, start + j, length - j, E, BLOCK_KEYS, BLOCK_E)
            b_s = dot_rows(b_q, b_k, PRECISION)
            if CAP > 0:
                b_s, b_slope = tanh(b_s * (scale / CAP))
            b_dp = dot_rows(b_do, b_v, PRECISION)
            b_p = tl.math.exp2(b_s * scale_log2 - b_lse[:, None])
            if (j < head) | (j >= tail):
                o_key = tl.arange(0, BLOCK_KEYS)[None, :]
                last_key = last_key_seen(length, shift, low, high, BLOCK_ROWS)
                b_p = tl.where(o_key <= (last_key - j)[:, None], b_p, 0.0)
                if WINDOW:
                    b_p = tl.where(o_key > (o_row + shift - window - j)[:, None], b_p, 0.0)
            b_ds = b_p * (b_dp - b_delta[:, None])
            if CAP > 0:
                b_ds *= b_slope
            b_dq = add_dot(b_dq, b_ds.to(b_k.dtype), b_k, PRECISION)

    o_d = tl.arange(0, BLOCK_D)
    inside = (o_row < ROWS - row0)[:, None] & (o_d < D)[None, :]
    dq = head_of(dq, dq_strides, i_b, i_h) + row0.to(tl.int64) * dq_strides[1]
    put(dq + o_row[:, None] * dq_strides[1] + o_d[None, :], b_dq * scale, inside, ADD)


@triton.jit
def part_at(runs, i_part, MASKED: tl.constexpr):
    """start, length, shift, low, high, window of the middle of a run, or of what needs a mask before and after it."""
    if MASKED:
        start, length, head, tail, shift, low, high, window = run_at(runs, i_part // 2)
        begin = tl.where(i_part % 2 == 0, 0, tail)
        end = tl.where(i_part % 2 == 0, tl.minimum(head, length), length)
    else:
        start, length, begin, end, shift, low, high, window = run_at(runs, i_part)
    return start + begin, end - begin, shift + begin, low, high, window


@triton.jit
def load_rows(p_x, valid, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK]: one number per row; OTHER from row `valid` on."""
    o_row = tl.arange(0, BLOCK)
    if valid is None:
        return tl.load(p_x + o_row)
    else:
        return tl.load(p_x + o_row, mask=o_row < valid, other=OTHER)


@triton.jit
def put(p_x, b_x, inside, ADD: tl.constexpr):
    """Stores a tile, or adds it to what is there. No other program touches the tile, so the order of sums is fixed;
    the reduction instruction only spares the registers of a load."""
    if ADD:
        tl.atomic_add(p_x, b_x, mask=inside, sem="relaxed")
    else:
        tl.store(p_x, b_x, mask=inside)
