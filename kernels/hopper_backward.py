"""FlashAttention backward over segments for Hopper, in Gluon: dK, dV and dQ in one kernel, five products a block.

With the final lse and delta = rowsum(dO * O) every block stands for itself (arXiv:2307.08691, section 3.1.2):

    P = exp(scale Q K^T - lse)    dS = P (dO V^T - delta)    dV = P^T dO    dK = scale dS^T Q    dQ = scale dS K

A program owns one tile of keys of one key/value head and walks the rows that see it, head by head of the group, so dK
and dV are summed in registers by one owner in a fixed order. Its warps do four different things (arXiv:2407.08608,
section 3.1): one loads blocks of Q and dO, two warpgroups compute, half of the keys each, and one adds what they make
of dQ to the sum in memory. A block in the life of a warpgroup:

    products     dP = V dO^T | dV += P^T dO | dQ = dS K | dK += dS^T Q | S = K Q^T of the next block
    the rest     P = exp(S)  | dS           |           | dQ to the one that adds it

Blocks are transposed, [keys, rows], so that P^T and dS^T already lie where their products want their left operand.
Only dQ needs the other warpgroup's keys: dS goes through shared memory, and each warpgroup computes one half of dQ
from all keys of the tile. The adds of different programs to one row come in any order.
"""

# pyright: reportGeneralTypeIssues=false

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_tile import fetch, named_sync, product_layout, reduce_add, run_at, tile_at

__all__ = ["gradients_kernel"]

LOG2E = gl.constexpr(1.4426950408889634)
KEYS_OF_TILE = gl.constexpr(128)
ROWS = gl.constexpr(64)


@gluon.jit(do_not_specialize=["KEYS"])
def gradients_kernel(
    q, k, v, dout, lse, delta, dq, dk, dv, tiles, runs, scale, KEYS, dk_strides, dv_strides,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, E: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """dK and dV of every tile in `tiles`, and dQ added to a sum.

    q, k, v, dout, dq are descriptors [B, H, L, D]; lse and delta [B * H, L]; dk and dv pointers, rows dk_strides apart.
    """
    WIDTH: gl.constexpr = k.block_type.shape[3]
    HALF_WIDTH: gl.constexpr = dq.block_type.shape[3]
    dtype: gl.constexpr = k.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS_OF_TILE, WIDTH], dtype)
    per_row: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS_OF_TILE, ROWS], dtype)
    dq_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HALF_WIDTH], gl.float32)
    s_k = gl.allocate_shared_memory(dtype, [KEYS_OF_TILE, WIDTH], tile)
    s_v = gl.allocate_shared_memory(dtype, [KEYS_OF_TILE, WIDTH], tile)
    s_q = gl.allocate_shared_memory(dtype, [2, ROWS, WIDTH], tile)
    s_do = gl.allocate_shared_memory(dtype, [2, ROWS, WIDTH], tile)
    s_lse = gl.allocate_shared_memory(gl.float32, [2, ROWS], per_row)
    s_delta = gl.allocate_shared_memory(gl.float32, [2, ROWS], per_row)
    s_ds = gl.allocate_shared_memory(dtype, [2, KEYS_OF_TILE, ROWS], ds_layout)
    s_dq = gl.allocate_shared_memory(gl.float32, [4, ROWS, HALF_WIDTH], dq_layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    dq_full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    dq_empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(4):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_empty.index(i), count=1)
    fence_async_shared()

    i_bg = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
    i_b, i_g = i_bg // GROUPS, i_bg % GROUPS
    key0, first, middle, end = tile_at(tiles, gl.program_id(1))
    if key0 + KEYS_OF_TILE > KEYS:  # keys past the end are zeros, but P of a zero need not be finite
        middle = first
    place = (i_b, i_g, key0)
    walk = (runs, first, middle, end)
    keys = (s_k, s_v, kv_full)
    ring = (s_q, s_do, s_lse, s_delta, full, empty)
    adds = (s_dq, dq_full, dq_empty)
    outs = (dk, dv, dk_strides, dv_strides, scale, KEYS)
    gl.warp_specialize([
        (compute, (0, keys, ring, s_ds, adds, outs, place, walk, GROUP, D, E, ADD)),
        (compute, (1, keys, ring, s_ds, adds, outs, place, walk, GROUP, D, E, ADD)),
        (load, (q, k, v, dout, lse, delta, keys, ring, place, walk, GROUPS, GROUP)),
        (add, (dq, adds, place, walk, GROUP)),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


@gluon.jit
def load(q, k, v, dout, lse, delta, keys, ring, place, walk, GROUPS: gl.constexpr, GROUP: gl.constexpr):
    """Keys and values once, then blocks of rows as fast as they are used up."""
    s_k, s_v, kv_full = keys
    s_q, s_do, s_lse, s_delta, full, empty = ring
    i_b, i_g, key0 = place
    runs, first, middle, end = walk
    mbarrier.expect(kv_full, 2 * k.block_type.nbytes)
    fetch(k, [i_b, i_g, key0, 0], kv_full, s_k)
    fetch(v, [i_b, i_g, key0, 0], kv_full, s_v)
    phase = 1
    for i_run in range(first, end):
        start, length, shift, low, high, window = run_at(runs, i_run)
        for i_h in range(i_g * GROUP, (i_g + 1) * GROUP):
            i_bh = i_b * GROUPS * GROUP + i_h
            for row in range(start, start + length, 2 * ROWS):
                for i in gl.static_range(2):
                    mbarrier.wait(empty.index(i), phase)
                    mbarrier.expect(full.index(i), 2 * q.block_type.nbytes + 8 * ROWS)
                    fetch(q, [i_b, i_h, row + i * ROWS, 0], full.index(i), s_q.index(i))
                    fetch(lse, [i_bh, row + i * ROWS], full.index(i), s_lse.index(i))
                    fetch(dout, [i_b, i_h, row + i * ROWS, 0], full.index(i), s_do.index(i))
                    fetch(delta, [i_bh, row + i * ROWS], full.index(i), s_delta.index(i))
                phase ^= 1


@gluon.jit
def add(dq, adds, place, walk, GROUP: gl.constexpr):
    """Both halves of dQ of every block, as they come, to the sum in memory."""
    s_dq, dq_full, dq_empty = adds
    i_b, i_g, key0 = place
    runs, first, middle, end = walk
    HALF_WIDTH: gl.constexpr = s_dq.shape[2]
    phase = 0
    for i_run in range(first, end):
        start, length, shift, low, high, window = run_at(runs, i_run)
        for i_h in range(i_g * GROUP, (i_g + 1) * GROUP):
            for row in range(start, start + length, 2 * ROWS):
                for i in gl.static_range(2):
                    for half in gl.static_range(2):
                        mbarrier.wait(dq_full.index(2 * i + half), phase)
                        reduce_add(dq, [i_b, i_h, row + i * ROWS, half * HALF_WIDTH], s_dq.index(2 * i + half))
                    tma.store_wait(0)
                    for half in gl.static_range(2):
                        mbarrier.arrive(dq_empty.index(2 * i + half), count=1)
                phase ^= 1


@gluon.jit
def compute(
    HALF: gl.constexpr, keys, ring, s_ds, adds, outs, place, walk,
    GROUP: gl.constexpr, D: gl.constexpr, E: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """One half of the tile's keys: their dK and dV, and one half of dQ of every block."""
    s_k, s_v, kv_full = keys
    dk, dv, dk_strides, dv_strides, scale, KEYS = outs
    i_b, i_g, key0 = place
    runs, first, middle, end = walk
    WIDTH: gl.constexpr = s_k.shape[1]
    SUMS: gl.constexpr = product_layout(WIDTH)
    key = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, product_layout(ROWS)))
    b_dk = gl.zeros([64, WIDTH], gl.float32, SUMS)
    b_dv = gl.zeros([64, WIDTH], gl.float32, SUMS)
    mbarrier.wait(kv_full, 0)
    phase = 0
    for i_run in tl.range(first, middle, disable_licm=True):
        length = gl.load(runs + 6 * i_run + 1)
        for i in tl.range(length // (2 * ROWS) * GROUP, disable_licm=True):
            b_dk, b_dv = block(HALF, 0, phase, keys, ring, s_ds, adds, b_dk, b_dv, scale, None, None)
            b_dk, b_dv = block(HALF, 1, phase, keys, ring, s_ds, adds, b_dk, b_dv, scale, None, None)
            phase ^= 1
    for i_run in tl.range(middle, end, disable_licm=True):
        start, length, shift, low, high, window = run_at(runs, i_run)
        age = shift - key
        seen = gl.where((key >= low) & (key < high), gl.minimum(length + age, window), 0)
        for i_h in tl.range(GROUP, disable_licm=True):
            for j in tl.range(0, length, 2 * ROWS, disable_licm=True):
                b_dk, b_dv = block(HALF, 0, phase, keys, ring, s_ds, adds, b_dk, b_dv, scale, age + j, seen)
                b_dk, b_dv = block(HALF, 1, phase, keys, ring, s_ds, adds, b_dk, b_dv, scale, age + j + ROWS, seen)
                phase ^= 1

    row = key0 + HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SUMS))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, SUMS))
    p_dk = dk + i_b.to(gl.int64) * dk_strides[0] + i_g.to(gl.int64) * dk_strides[2]
    p_dv = dv + i_b.to(gl.int64) * dv_strides[0] + i_g.to(gl.int64) * dv_strides[2]
    put(p_dv + row.to(gl.int64)[:, None] * dv_strides[1] + column[None, :], b_dv, (row < KEYS)[:, None] & (column < E)[None, :], ADD)
    put(p_dk + row.to(gl.int64)[:, None] * dk_strides[1] + column[None, :], b_dk * scale, (row < KEYS)[:, None] & (column < D)[None, :], ADD)


@gluon.jit
def block(HALF: gl.constexpr, STAGE: gl.constexpr, phase, keys, ring, s_ds, adds, b_dk, b_dv, scale, age, seen):
    """Row t of the block is seen by those keys for which 0 <= age + t < seen; age None: by all."""
    s_k, s_v, kv_full = keys
    s_q, s_do, s_lse, s_delta, full, empty = ring
    s_dq, dq_full, dq_empty = adds
    WIDTH: gl.constexpr = s_q.shape[2]
    HALF_WIDTH: gl.constexpr = s_dq.shape[2]
    SCORES: gl.constexpr = product_layout(ROWS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(WIDTH), k_width=2)
    QUERIES: gl.constexpr = product_layout(HALF_WIDTH)
    dtype: gl.constexpr = s_q.dtype
    b_q, b_do, b_ds_both = s_q.index(STAGE), s_do.index(STAGE), s_ds.index(STAGE)

    mbarrier.wait(full.index(STAGE), phase)
    zeros = gl.zeros([64, ROWS], gl.float32, SCORES)
    b_s = warpgroup_mma(s_k.slice(HALF * 64, 64), b_q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_dp = warpgroup_mma(s_v.slice(HALF * 64, 64), b_do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_lse = s_lse.index(STAGE).load(gl.SliceLayout(0, SCORES)) * LOG2E
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    b_p = gl.exp2(b_s * (scale * LOG2E) - b_lse[None, :])
    if age is not None:
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, SCORES))
        since = age[:, None] + row[None, :]
        b_p = gl.where((since >= 0) & (since < seen[:, None]), b_p, 0.0)
    b_dv = warpgroup_mma(gl.convert_layout(b_p.to(dtype), LEFT), b_do, b_dv, is_async=True)
    b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
    b_delta = s_delta.index(STAGE).load(gl.SliceLayout(0, SCORES))
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(dtype)
    b_ds_both.slice(HALF * 64, 64).store(b_ds)
    fence_async_shared()
    named_sync(9, 256)

    zeros = gl.zeros([ROWS, HALF_WIDTH], gl.float32, QUERIES)
    b_k_half = s_k.slice(HALF * HALF_WIDTH, HALF_WIDTH, dim=1)
    b_dq = warpgroup_mma(b_ds_both.permute((1, 0)), b_k_half, zeros, use_acc=False, is_async=True)
    b_dk = warpgroup_mma(gl.convert_layout(b_ds, LEFT), b_q, b_dk, is_async=True)
    b_dq, b_dv = warpgroup_mma_wait(1, deps=(b_dq, b_dv))
    mbarrier.wait(dq_empty.index(2 * STAGE + HALF), phase ^ 1)
    s_dq.index(2 * STAGE + HALF).store(b_dq * scale)
    fence_async_shared()
    mbarrier.arrive(dq_full.index(2 * STAGE + HALF), count=1)
    b_dk = warpgroup_mma_wait(0, deps=(b_dk,))
    mbarrier.arrive(empty.index(STAGE), count=1)
    return b_dk, b_dv


@gluon.jit
def put(p_x, b_x, inside, ADD: gl.constexpr):
    """Stores a tile, or adds it to what is there; nobody else touches it."""
    if ADD:
        b_x += gl.load(p_x, mask=inside, other=0.0)
    gl.store(p_x, b_x, mask=inside)
