"""One block of the Hopper backward as a warpgroup computes it: 64 keys by 128 rows, in two steps of 64 rows.

Names as in `hopper_backward.py`. `mask` is (whether the block needs one, runs, the run, where in it the block begins).
Products are begun and waited for in the order of the lines; a wait for n leaves the last n under way.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOptionalMemberAccess=false

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_add import store_spread
from .hopper_tile import LOG2E, named_sync, product_layout, run_at

__all__ = ["narrow_block", "wide_block"]

ROWS = gl.constexpr(64)


@gluon.jit
def wide_block(HALF: gl.constexpr, slot, phase, my_k, my_v, s_k, ring, s_ds, adds, b_dk, b_dv, scale, mask):
    """Head dims up to 128: after each step this warpgroup's half of the columns of dQ.

    The loop over steps is one that the compiler must not unroll: with addresses for both, registers spill.
    """
    s_q, s_do, s_lse, s_delta, full, empty = ring
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(s_q.shape[2]), k_width=2)
    dtype: gl.constexpr = s_q.dtype
    for step in tl.range(2, disable_licm=True):
        mbarrier.wait(full.index(step), phase)
        b_s, b_dp = before(s_lse.index(step), s_delta.index(step), scale)
        b_s = warpgroup_mma(my_k, s_q.index(step).permute((1, 0)), b_s, is_async=True)
        b_dp = warpgroup_mma(my_v, s_do.index(step).permute((1, 0)), b_dp, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        b_p = hidden(gl.exp2(b_s * (scale * LOG2E)), mask, step * ROWS, HALF)
        b_dv = warpgroup_mma(gl.convert_layout(b_p.to(dtype), LEFT), s_do.index(step), b_dv, is_async=True)
        b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
        b_ds = (b_p * b_dp).to(dtype)
        s_ds.index(step).slice(HALF * 64, 64).store(b_ds)
        fence_async_shared()
        named_sync(9, 256)
        b_dq = begin(s_ds.index(step).permute((1, 0)), s_k.slice(HALF * 64, 64, dim=1))
        b_dk = warpgroup_mma(gl.convert_layout(b_ds, LEFT), s_q.index(step), b_dk, is_async=True)
        b_dq, b_dv = warpgroup_mma_wait(1, deps=(b_dq, b_dv))
        hand_over(b_dq * scale, adds, 2 * step + HALF, phase)
        b_dk = warpgroup_mma_wait(0, deps=(b_dk,))
        mbarrier.arrive(empty.index(step), count=1)
    return b_dk, b_dv


@gluon.jit
def narrow_block(HALF: gl.constexpr, slot, phase, my_k, my_v, s_k, ring, s_ds, adds, b_dk, b_dv, scale, mask):
    """Head dims up to 64: both steps at once, then this warpgroup's half of the rows of dQ."""
    s_q, s_do, s_lse, s_delta, full, empty = ring
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(s_q.shape[2]), k_width=2)
    dtype: gl.constexpr = s_q.dtype
    q0, q1, do0, do1 = s_q.index(slot), s_q.index(slot + 1), s_do.index(slot), s_do.index(slot + 1)
    mbarrier.wait(full.index(slot), phase)
    b_s0 = begin(my_k, q0.permute((1, 0)))
    b_dp0 = begin(my_v, do0.permute((1, 0)))
    mbarrier.wait(full.index(slot + 1), phase)
    b_s1 = begin(my_k, q1.permute((1, 0)))
    b_s0 = warpgroup_mma_wait(2, deps=(b_s0,))
    b_p0 = hidden(weights(b_s0, s_lse.index(slot), scale), mask, 0, HALF)
    b_dv = warpgroup_mma(gl.convert_layout(b_p0.to(dtype), LEFT), do0, b_dv, is_async=True)
    b_dp0 = warpgroup_mma_wait(2, deps=(b_dp0,))
    b_ds0 = slopes(b_p0, b_dp0, s_delta.index(slot), dtype)
    s_ds.index(slot).slice(HALF * 64, 64).store(b_ds0)
    b_dp1 = begin(my_v, do1.permute((1, 0)))
    b_dk = warpgroup_mma(gl.convert_layout(b_ds0, LEFT), q0, b_dk, is_async=True)
    b_s1 = warpgroup_mma_wait(3, deps=(b_s1,))
    b_p1 = hidden(weights(b_s1, s_lse.index(slot + 1), scale), mask, ROWS, HALF)
    b_dv = warpgroup_mma(gl.convert_layout(b_p1.to(dtype), LEFT), do1, b_dv, is_async=True)
    b_dp1 = warpgroup_mma_wait(2, deps=(b_dp1,))
    b_ds1 = slopes(b_p1, b_dp1, s_delta.index(slot + 1), dtype)
    s_ds.index(slot + 1).slice(HALF * 64, 64).store(b_ds1)
    fence_async_shared()
    named_sync(9, 256)
    b_dq = begin(s_ds.index(slot + HALF).permute((1, 0)), s_k)
    b_dk = warpgroup_mma(gl.convert_layout(b_ds1, LEFT), q1, b_dk, is_async=True)
    b_dq = warpgroup_mma_wait(1, deps=(b_dq,))
    hand_over(b_dq * scale, adds, HALF, slot >> 1)
    b_dk, b_dv = warpgroup_mma_wait(0, deps=(b_dk, b_dv))
    mbarrier.arrive(empty.index(slot), count=1)
    mbarrier.arrive(empty.index(slot + 1), count=1)
    return b_dk, b_dv


@gluon.jit
def begin(a, b):
    """A product, under way."""
    M: gl.constexpr = a.shape[0]
    N: gl.constexpr = b.shape[1]
    return warpgroup_mma(a, b, gl.zeros([M, N], gl.float32, product_layout(N)), use_acc=False, is_async=True)


@gluon.jit
def before(s_lse, s_delta, scale):
    """What the products S and dP of a step are added to, -lse / scale and -delta of every row: it costs no registers
    later on, where they are short. A row that sees nothing has S = inf, which its mask hides."""
    SCORES: gl.constexpr = product_layout(ROWS)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    zeros = gl.zeros([64, ROWS], gl.float32, SCORES)
    b_lse = s_lse.load(COLUMNS) * (-1.0 / scale)
    return zeros + b_lse[None, :], zeros - s_delta.load(COLUMNS)[None, :]


@gluon.jit
def weights(b_s, s_lse, scale):
    """P of one step."""
    b_lse = s_lse.load(gl.SliceLayout(0, b_s.type.layout)) * LOG2E
    return gl.exp2(b_s * (scale * LOG2E) - b_lse[None, :])


@gluon.jit
def slopes(b_p, b_dp, s_delta, dtype: gl.constexpr):
    """dS of one step."""
    b_delta = s_delta.load(gl.SliceLayout(0, b_dp.type.layout))
    return (b_p * (b_dp - b_delta[None, :])).to(dtype)


@gluon.jit
def hidden(b_p, mask, ROW, HALF: gl.constexpr):
    """P, zero where it is masked: row t of a run is seen by key u iff t + shift - window < u <= t + shift, which is
    one comparison for every key, unsigned."""
    masked, runs, i_run, j = mask
    if masked:
        _, length, _, _, shift, low, high, window = run_at(runs, i_run)
        key = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, b_p.type.layout))
        first_row = gl.maximum(key - shift, low >> 16)  # rows before that are of no segment
        end = gl.minimum(length, key - shift + window)
        span = gl.where((key >= (low & 0xFFFF)) & (key < high), gl.maximum(end - first_row, 0), 0)
        first_row -= j + ROW
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, b_p.type.layout))
        b_p = gl.where((row[None, :] - first_row[:, None]).to(gl.uint32) < span.to(gl.uint32)[:, None], b_p, 0.0)
    return b_p


@gluon.jit
def hand_over(b_dq, adds, part, phase):
    """A part of dQ of a block to the warp that adds it."""
    s_dq, dq_full, dq_empty = adds
    mbarrier.wait(dq_empty.index(part), phase ^ 1)
    store_spread(s_dq.index(part), b_dq)
    fence_async_shared()
    mbarrier.arrive(dq_full.index(part), count=1)
