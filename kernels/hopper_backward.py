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

from .hopper_tile import viewed, await_turn, fetch, named_sync, product_layout, reduce_add, reduced, run_at

__all__ = ["gradients_kernel"]

LOG2E = gl.constexpr(1.4426950408889634)
KEYS_OF_TILE = gl.constexpr(128)
ROWS = gl.constexpr(64)
BLOCK = gl.constexpr(128)  # rows


@gluon.jit(do_not_specialize=["KEYS", "CELLS"])
def gradients_kernel(
    q, k, v, dout, lse, delta, dq, dk, dv, tiles, runs, visits, turns, counters, scale, KEYS, CELLS,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, SHIFTS: gl.constexpr, ADD: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """dK and dV of every tile in `tiles`, and dQ added to a sum.

    q, k, v, dout, dq, dk, dv are descriptors of [B, H, L, D]; lse and delta of [B * H * SHIFTS, L]: a
    copy begins at row 0, the next at row 1, and so on, because TMA reads from multiples of 16 bytes only.
    """
    WIDTH: gl.constexpr = k.block_type.shape[3]
    SLOTS: gl.constexpr = 2 if WIDTH == 128 else 4
    PARTS: gl.constexpr = WIDTH // 32
    dtype: gl.constexpr = k.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS_OF_TILE, WIDTH], dtype)
    per_row: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS_OF_TILE, ROWS], dtype)
    dq_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 64], gl.float32)
    s_k = gl.allocate_shared_memory(dtype, [KEYS_OF_TILE, WIDTH], tile)
    s_v = gl.allocate_shared_memory(dtype, [KEYS_OF_TILE, WIDTH], tile)
    s_q = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, WIDTH], tile)
    s_do = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, WIDTH], tile)
    s_lse = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], per_row)
    s_delta = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], per_row)
    s_ds = gl.allocate_shared_memory(dtype, [SLOTS, KEYS_OF_TILE, ROWS], ds_layout)
    s_dq = gl.allocate_shared_memory(gl.float32, [PARTS, ROWS, 64], dq_layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    dq_full = gl.allocate_shared_memory(gl.int64, [PARTS, 1], mbarrier.MBarrierLayout())
    dq_empty = gl.allocate_shared_memory(gl.int64, [PARTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(PARTS):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_empty.index(i), count=1)
    fence_async_shared()

    keys = (s_k, s_v, kv_full)
    ring = (s_q, s_do, s_lse, s_delta, full, empty)
    adds = (s_dq, dq_full, dq_empty)
    gl.warp_specialize([
        (compute, (0, dk, dv, scale, KEYS, keys, ring, s_ds, adds, tiles, runs, GROUPS, GROUP, SHARE, ADD)),
        (compute, (1, dk, dv, scale, KEYS, keys, ring, s_ds, adds, tiles, runs, GROUPS, GROUP, SHARE, ADD)),
        (load, (q, k, v, dout, lse, delta, keys, ring, tiles, runs, GROUPS, GROUP, SHARE, SHIFTS)),
        (add, (dq, adds, tiles, runs, visits, turns, counters, CELLS, GROUPS, GROUP, SHARE, ORDERED)),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


@gluon.jit
def load(
    q, k, v, dout, lse, delta, keys, ring, tiles, runs,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, SHIFTS: gl.constexpr,
):  # fmt: skip
    """Keys and values once, then blocks of rows as fast as they are used up."""
    s_k, s_v, kv_full = keys
    s_q, s_do, s_lse, s_delta, full, empty = ring
    i_b, i_g, head0, key0, first, end = locate(tiles, GROUPS, GROUP, SHARE)
    mbarrier.expect(kv_full, 2 * k.block_type.nbytes)
    fetch(k, [i_b, i_g, key0, 0], kv_full, s_k)
    fetch(v, [i_b, i_g, key0, 0], kv_full, s_v)
    slot, phase = 0, 1
    for i_run in range(first, end):
        start, length, head, tail, shift, low, high, window = run_at(runs, i_run)
        for i_h in range(head0, head0 + SHARE):
            odd = start % SHIFTS
            i_bhs = (i_b * GROUPS * GROUP + i_h) * SHIFTS + odd
            for n in range(gl.cdiv(length, BLOCK)):
                row = start + block_at(n, length, head, tail)
                for step in gl.static_range(2):
                    i, j = slot + step, row + step * ROWS
                    mbarrier.wait(empty.index(i), phase)
                    mbarrier.expect(full.index(i), 2 * q.block_type.nbytes + 8 * ROWS)
                    fetch(q, [i_b, i_h, j, 0], full.index(i), s_q.index(i))
                    fetch(lse, [i_bhs, j - odd], full.index(i), s_lse.index(i))
                    fetch(dout, [i_b, i_h, j, 0], full.index(i), s_do.index(i))
                    fetch(delta, [i_bhs, j - odd], full.index(i), s_delta.index(i))
                slot, phase = advance(slot, phase, s_q.shape[0])


@gluon.jit
def add(
    dq, adds, tiles, runs, visits, turns, counters, CELLS,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """Both halves of dQ of every block, as they come, to the sum in memory; where the order matters, when it is this
    tile's turn (`turns.py`)."""
    s_dq, dq_full, dq_empty = adds
    i_b, i_g, head0, key0, first, end = locate(tiles, GROUPS, GROUP, SHARE)
    PARTS: gl.constexpr = s_dq.shape[0]
    phase = 0
    for i_run in range(first, end):
        start, length, head, tail, shift, low, high, window = run_at(runs, i_run)
        for i_h in range(head0, head0 + SHARE):
            if ORDERED:
                p_turn = turns + 2 * gl.load(visits + i_run)
            for n in range(gl.cdiv(length, BLOCK)):
                row = start + block_at(n, length, head, tail)
                if ORDERED:
                    turn, next_turn = gl.load(p_turn), gl.load(p_turn + 1)
                    p_counter = counters + (i_b * GROUPS * GROUP + i_h) * CELLS + row // BLOCK
                    await_turn(p_counter, turn)
                    if next_turn >= 0:
                        await_turn(p_counter + 1, next_turn)
                for pair in gl.static_range(0, PARTS, 2):
                    for i in gl.static_range(pair, pair + 2):
                        mbarrier.wait(dq_full.index(i), phase)
                        j = row + i // (PARTS // 2) * ROWS
                        reduce_add(dq, [i_b, i_h, j, i % (PARTS // 2) * 64], s_dq.index(i))
                    tma.store_wait(0)
                    for i in gl.static_range(pair, pair + 2):
                        mbarrier.arrive(dq_empty.index(i), count=1)
                if ORDERED:
                    reduced()
                    gl.atomic_add(p_counter, 1, sem="release")
                    if next_turn >= 0:
                        gl.atomic_add(p_counter + 1, 1, sem="release")
                    p_turn += 2
                phase ^= 1


@gluon.jit
def compute(
    HALF: gl.constexpr, dk, dv, scale, KEYS, keys, ring, s_ds, adds, tiles, runs,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """One half of the tile's keys: their dK and dV, and one half of dQ of every block."""
    s_k, s_v, kv_full = keys
    s_dq, dq_full, dq_empty = adds
    i_b, i_g, head0, key0, first, end = locate(tiles, GROUPS, GROUP, SHARE)
    WIDTH: gl.constexpr = s_k.shape[1]
    SUMS: gl.constexpr = product_layout(WIDTH)
    SLOTS: gl.constexpr = ring[0].shape[0]
    block: gl.constexpr = wide_block if WIDTH == 128 else narrow_block
    b_dk = gl.zeros([64, WIDTH], gl.float32, SUMS)
    b_dv = gl.zeros([64, WIDTH], gl.float32, SUMS)
    mbarrier.wait(kv_full, 0)
    left_k, left_v = keys[0].slice(HALF * 64, 64), keys[1].slice(HALF * 64, 64)
    if WIDTH == 64:
        SCORES_LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(ROWS), k_width=2)
        left_k, left_v = left_k.load(SCORES_LEFT), left_v.load(SCORES_LEFT)
    slot, phase = 0, 0
    for i_run in tl.range(first, end, disable_licm=True):
        p_run = runs + 8 * i_run
        start, length, head, tail = gl.load(p_run), gl.load(p_run + 1), gl.load(p_run + 2), gl.load(p_run + 3)
        for i_h in tl.range(head0, head0 + SHARE, disable_licm=True):
            for n in tl.range(gl.cdiv(length, BLOCK), disable_licm=True):
                masked = n >= (tail - head) // BLOCK
                j = block_at(n, length, head, tail)
                b_dk, b_dv = block(HALF, slot, phase, left_k, left_v, keys, ring, s_ds, adds, b_dk, b_dv, scale, p_run, j, masked)
                slot, phase = advance(slot, phase, SLOTS)

    for part in gl.static_range(WIDTH // 64):
        mbarrier.wait(dq_empty.index(2 * part + HALF), (phase if SLOTS == 2 else slot >> 1) ^ 1)
    i_b, i_g, head0, key0, first, end = locate(tiles, GROUPS, GROUP, SHARE)
    s_out = viewed(s_dq, gl.float32, [2, 64, WIDTH], gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], gl.float32)).index(HALF)
    put(dv, b_dv, s_out, [i_b, i_g, key0 + HALF * 64, 0], ADD)
    put(dk, b_dk * scale, s_out, [i_b, i_g, key0 + HALF * 64, 0], ADD)


@gluon.jit
def locate(tiles, GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr):
    """Batch, key/value head, first query head, first key, first run and end of the runs of this program."""
    i_share = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
    SHARES: gl.constexpr = GROUP // SHARE
    i_bg = i_share // SHARES
    i_g = i_bg % GROUPS
    p_tile = tiles + 3 * gl.program_id(1)
    head0 = i_g * GROUP + i_share % SHARES * SHARE
    return i_bg // GROUPS, i_g, head0, gl.load(p_tile), gl.load(p_tile + 1), gl.load(p_tile + 2)


@gluon.jit
def block_at(n, length, head, tail):
    """Where the n-th block of a run begins, in the order of the walk: those without a mask, then the others, last rows
    first. Tiles that walk side by side come to the same rows at the same time."""
    whole = (tail - head) // BLOCK
    masked = (gl.cdiv(length, BLOCK) - 1 - n) * BLOCK
    return gl.where(n < whole, tail - (n + 1) * BLOCK, gl.where(masked < head, masked, masked - head + tail))


@gluon.jit
def advance(slot, phase, SLOTS: gl.constexpr):
    """The next two slots of the ring, and the phase of their barriers, which changes with each round."""
    if SLOTS == 2:
        return slot, phase ^ 1
    else:
        return slot ^ 2, gl.where(slot == 0, phase, phase ^ 1)


@gluon.jit
def wide_block(HALF: gl.constexpr, slot, phase, my_k, my_v, keys, ring, s_ds, adds, b_dk, b_dv, scale, p_run, j, masked):
    """Two steps of 64 rows each."""
    s_k, s_v, kv_full = keys
    s_q, s_do, s_lse, s_delta, full, empty = ring
    SUMS: gl.constexpr = product_layout(s_q.shape[2])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, k_width=2)
    dtype: gl.constexpr = s_q.dtype
    for step in gl.static_range(2):
        mbarrier.wait(full.index(step), phase)
        b_s = begin(my_k, s_q.index(step).permute((1, 0)))
        b_dp = begin(my_v, s_do.index(step).permute((1, 0)))
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        b_p = weights(b_s, s_lse.index(step), scale, p_run, j + step * ROWS, masked, HALF)
        b_dv = warpgroup_mma(gl.convert_layout(b_p.to(dtype), LEFT), s_do.index(step), b_dv, is_async=True)
        b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
        b_ds = slopes(b_p, b_dp, s_delta.index(step), dtype)
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
def narrow_block(HALF: gl.constexpr, slot, phase, my_k, my_v, keys, ring, s_ds, adds, b_dk, b_dv, scale, p_run, j, masked):
    """128 rows at once: half of them is this warpgroup's half of dQ."""
    s_k, s_v, kv_full = keys
    s_q, s_do, s_lse, s_delta, full, empty = ring
    SUMS: gl.constexpr = product_layout(s_q.shape[2])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, k_width=2)
    dtype: gl.constexpr = s_q.dtype
    q0, q1, do0, do1 = s_q.index(slot), s_q.index(slot + 1), s_do.index(slot), s_do.index(slot + 1)
    mbarrier.wait(full.index(slot), phase)
    b_s0 = begin(my_k, q0.permute((1, 0)))
    b_dp0 = begin(my_v, do0.permute((1, 0)))
    mbarrier.wait(full.index(slot + 1), phase)
    b_s1 = begin(my_k, q1.permute((1, 0)))
    b_s0 = warpgroup_mma_wait(2, deps=(b_s0,))
    b_p0 = weights(b_s0, s_lse.index(slot), scale, p_run, j, masked, HALF)
    b_dv = warpgroup_mma(gl.convert_layout(b_p0.to(dtype), LEFT), do0, b_dv, is_async=True)
    b_dp0 = warpgroup_mma_wait(2, deps=(b_dp0,))
    b_ds0 = slopes(b_p0, b_dp0, s_delta.index(slot), dtype)
    s_ds.index(slot).slice(HALF * 64, 64).store(b_ds0)
    b_dp1 = begin(my_v, do1.permute((1, 0)))
    b_dk = warpgroup_mma(gl.convert_layout(b_ds0, LEFT), q0, b_dk, is_async=True)
    b_s1 = warpgroup_mma_wait(3, deps=(b_s1,))
    b_p1 = weights(b_s1, s_lse.index(slot + 1), scale, p_run, j + ROWS, masked, HALF)
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
def weights(b_s, s_lse, scale, p_run, j, masked, HALF: gl.constexpr):
    """P of the rows from j on."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, b_s.type.layout)
    b_lse = s_lse.load(COLUMNS) * LOG2E
    b_p = gl.exp2(b_s * (scale * LOG2E) - b_lse[None, :])
    if masked:
        start, length, head, tail, shift, low, high, window = run_at(p_run, 0)
        key = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, b_s.type.layout))
        first_row = key - shift - j
        span = gl.where((key >= low) & (key < high), gl.minimum(gl.maximum(length - j - first_row, 0), window), 0)
        row = gl.arange(0, ROWS, layout=COLUMNS)
        b_p = gl.where((row[None, :] - first_row[:, None]).to(gl.uint32) < span.to(gl.uint32)[:, None], b_p, 0.0)
    return b_p


@gluon.jit
def slopes(b_p, b_dp, s_delta, dtype: gl.constexpr):
    """dS of one step."""
    b_delta = s_delta.load(gl.SliceLayout(0, b_dp.type.layout))
    return (b_p * (b_dp - b_delta[None, :])).to(dtype)


@gluon.jit
def hand_over(b_dq, adds, PART: gl.constexpr, phase):
    """Half of dQ of a block to the one that adds it."""
    s_dq, dq_full, dq_empty = adds
    mbarrier.wait(dq_empty.index(PART), phase ^ 1)
    store_spread(s_dq.index(PART), b_dq)
    fence_async_shared()
    mbarrier.arrive(dq_full.index(PART), count=1)


@gluon.constexpr_function
def spread_layout():
    """[64, 64] fp32 as TMA has it, rows of 128 bytes whose 16-byte pieces are swapped by the row's number, and in odd
    rows columns 16 apart swapped as well."""
    line = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]]
    rows = [[1, 4 ^ 16], [2, 8], [4, 16], [8, 0], [16, 0], [32, 0]]
    return gl.SharedLinearLayout(line + rows + [[0, 32]], alignment=1024)


@gluon.jit
def store_spread(s_x, b_x):
    """Stores [64, 64] without bank conflicts: two rows that would meet in a bank store different columns at a time."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, b_x.type.layout))
    left, right = gl.split(gl.permute(gl.reshape(b_x, [64, 2, 2, 16]), [0, 1, 3, 2]))
    b_swapped = gl.reshape(gl.permute(gl.join(right, left), [0, 1, 3, 2]), [64, 64])
    b_swapped = gl.convert_layout(b_swapped, b_x.type.layout)
    viewed(s_x, gl.float32, [64, 64], spread_layout()).store(gl.where((row % 2 == 1)[:, None], b_swapped, b_x))


@gluon.jit
def put(desc, b_x, s_x, coord, ADD: gl.constexpr):
    """Stores a tile, or adds it to what is there."""
    s_x.store(b_x)
    fence_async_shared()
    if ADD:
        reduce_add(desc, coord, s_x)
    else:
        tma.async_copy_shared_to_global(desc, coord, s_x)
    tma.store_wait(0)
