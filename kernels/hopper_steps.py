"""One step of the Hopper backward, 64 rows: what a warpgroup makes of it for its 64 keys, and dQ.

Names as in `hopper_backward.py`. Products are begun and waited for in the order of the lines; a wait for n leaves the
last n under way.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOptionalMemberAccess=false, reportOperatorIssue=false

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
from .hopper_mask import hidden, hidden_pairs
from .hopper_prepare import PIECES, WEIGHT_0, WEIGHT_1, WEIGHT_2
from .hopper_scores import pack, unpack
from .hopper_tile import advance, product_layout
from .hopper_walk import ROWS

__all__ = ["key_sums", "query_sums", "weights"]


@gluon.jit
def key_sums(HALF: gl.constexpr, steps, keys, ring, slopes, scale_log2):
    """dK / scale and dV of one half of the tile's keys, from all steps; dS of each goes to shared memory.

    At head dims over 64, S and dP are accumulated in the same registers, one after the other, and P is kept in fp16
    meanwhile. The assembler sets 24 registers aside and wants room for every accumulator beside them, or it makes each
    matrix instruction wait for the one before; with 32 more, too few would be left for dQ. At head dims up to 64 keys
    and values are in registers too, so that shared memory is read less.
    """
    s_k, s_v, kv_full = keys
    s_q, s_do, s_pieces, s_weights, s_place, s_walk, full, empty = ring
    s_ds, ds_full, ds_empty = slopes
    WIDTH: gl.constexpr = s_k.shape[1]
    dtype: gl.constexpr = s_k.dtype
    WIDE: gl.constexpr = product_layout(WIDTH)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, WIDE, k_width=2)
    b_dk = gl.zeros([64, WIDTH], gl.float32, product_layout(WIDTH))
    b_dv = gl.zeros([64, WIDTH], gl.float32, product_layout(WIDTH))
    mbarrier.wait(kv_full, 0)
    my_k, my_v = s_k.slice(HALF * 64, 64), s_v.slice(HALF * 64, 64)
    ROOM: gl.constexpr = WIDTH == 64  # in registers
    if ROOM:
        KEYS_LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(ROWS), k_width=2)
        my_k, my_v = my_k.load(KEYS_LEFT), my_v.load(KEYS_LEFT)
    slot, phase = 0, 0
    for _i_step in tl.range(steps, disable_licm=True):
        mbarrier.wait(full.index(slot), phase)
        b_s = start(s_weights.index(0), s_pieces.index(slot).permute((1, 0)))
        b_s = warpgroup_mma(my_k, s_q.index(slot).permute((1, 0)), b_s, is_async=True)
        if ROOM:
            b_dp = start(s_weights.index(1), s_pieces.index(slot).permute((1, 0)))
            b_dp = warpgroup_mma(my_v, s_do.index(slot).permute((1, 0)), b_dp, is_async=True)
            b_s = warpgroup_mma_wait(2, deps=(b_s,))
        else:
            b_s = warpgroup_mma_wait(0, deps=(b_s,))
        if ROOM:
            b_p = gl.exp2(hidden(b_s, s_place.index(slot), s_walk.index(slot), HALF) * scale_log2)
            b_dv = warpgroup_mma(unpack(pack(b_p, dtype), dtype, WIDE), s_do.index(slot), b_dv, is_async=True)
            b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
        else:
            b_p = gl.exp2(b_s * scale_log2)
            b_pair, b_kept = pack(b_p, dtype), pack(b_p, gl.float16)
            b_pair, b_kept = hidden_pairs(b_pair, b_kept, s_place.index(slot), s_walk.index(slot), HALF)
            b_dp = start_in(b_s, s_weights.index(1), s_pieces.index(slot).permute((1, 0)))
            b_dp = warpgroup_mma(my_v, s_do.index(slot).permute((1, 0)), b_dp, is_async=True)
            b_dv = warpgroup_mma(unpack(b_pair, dtype, WIDE), s_do.index(slot), b_dv, is_async=True)
            b_dp, b_kept = warpgroup_mma_wait(1, deps=(b_dp, b_kept))
            b_p = gl.convert_layout(unpack(b_kept, gl.float16, WIDE).to(gl.float32), b_dp.type.layout)
        b_ds = (b_p * b_dp).to(dtype)
        mbarrier.wait(ds_empty.index(slot), phase ^ 1)
        s_ds.index(slot).slice(HALF * 64, 64).store(b_ds)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(slot), count=1)
        b_dk = warpgroup_mma(gl.convert_layout(b_ds, LEFT), s_q.index(slot), b_dk, is_async=True)
        b_dk, b_dv = warpgroup_mma_wait(0, deps=(b_dk, b_dv))
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = advance(slot, phase, s_q.shape[0])
    return b_dk, b_dv


@gluon.jit
def query_sums(steps, keys, slopes, adds, scale):
    """dQ of every step, 64 columns at a time, to the warp that adds it."""
    s_k, _, kv_full = keys
    s_ds, ds_full, ds_empty = slopes
    s_dq, dq_full, dq_empty = adds
    COLUMNS: gl.constexpr = s_k.shape[1] // 64
    mbarrier.wait(kv_full, 0)
    slot, phase = 0, 0
    for _i_step in tl.range(steps, disable_licm=True):
        mbarrier.wait(ds_full.index(slot), phase)
        for column in gl.static_range(COLUMNS):
            part = column if COLUMNS == 2 else slot % 2
            b_dq = start(s_ds.index(slot).permute((1, 0)), s_k.slice(column * 64, 64, dim=1))
            b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
            if column == COLUMNS - 1:
                mbarrier.arrive(ds_empty.index(slot), count=1)
            mbarrier.wait(dq_empty.index(part), (slot if COLUMNS == 2 else slot // 2) ^ 1)
            store_spread(s_dq.index(part), b_dq * scale)
            fence_async_shared()
            mbarrier.arrive(dq_full.index(part), count=1)
        slot, phase = advance(slot, phase, s_ds.shape[0])


@gluon.jit
def start(a, b):
    """A product, under way."""
    M: gl.constexpr = a.shape[0]
    N: gl.constexpr = b.shape[1]
    return start_in(gl.zeros([M, N], gl.float32, product_layout(N)), a, b)


@gluon.jit
def start_in(b_old, a, b):
    """A product, under way, in the registers of one that is not needed any more."""
    return warpgroup_mma(a, b, b_old, use_acc=False, is_async=True)


@gluon.jit
def weights(FIRST: gl.constexpr, dtype: gl.constexpr):
    """[64, PIECES], each row the weights of the pieces that begin at FIRST: see `hopper_prepare.py`."""
    layout: gl.constexpr = product_layout(PIECES)
    i_piece = gl.arange(0, PIECES, layout=gl.SliceLayout(0, layout)) - FIRST
    row = gl.where(i_piece == 2, WEIGHT_2, 0.0)
    row = gl.where(i_piece == 0, WEIGHT_0, gl.where(i_piece == 1, WEIGHT_1, row))
    return (gl.zeros([64, PIECES], gl.float32, layout) + row[None, :]).to(dtype)
