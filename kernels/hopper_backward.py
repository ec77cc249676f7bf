"""FlashAttention backward over segments for Hopper, in Gluon: dK, dV and dQ in one kernel, five products a block.

With the final lse and delta = rowsum(dO * O) every block stands for itself (arXiv:2307.08691, section 3.1.2):

    P = exp(scale Q K^T - lse)    dS = P (dO V^T - delta)    dV = P^T dO    dK = scale dS^T Q    dQ = scale dS K

A program owns 128 keys of one key/value head and walks the rows that see them, head by head, so dK and dV are summed in
registers by one owner in a fixed order. Its warps do different things (arXiv:2407.08608, section 3.1): one loads blocks
of Q and dO, two warpgroups compute, 64 keys each, and one adds what they make of dQ to the sum in memory. A step of
64 rows in the life of a warpgroup:

    products     S = K Q^T | dP = V dO^T | dV += P^T dO | dQ = dS K | dK += dS^T Q
    the rest               | P = exp(S)  | dS           |           | dQ to the one that adds it

Blocks are transposed, [keys, rows], so that P^T and dS^T already lie where their products want their left operand.
Only dQ needs the other warpgroup's keys: dS goes through shared memory, and each warpgroup computes one half of dQ from
all keys of the tile. What limits the kernel is shared memory, 128 bytes a clock: see docs/kernels.md.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOptionalMemberAccess=false

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .hopper_add import await_turn, reduce_add, reduced, viewed
from .hopper_steps import narrow_block, wide_block
from .hopper_tile import fetch, product_layout, run_at

__all__ = ["hopper_backward_kernel"]

KEYS = gl.constexpr(128)  # of a tile
ROWS = gl.constexpr(64)  # of a step
BLOCK = gl.constexpr(128)  # rows of a block, two steps


@gluon.jit(do_not_specialize=["CELLS"])
def hopper_backward_kernel(
    q, k, v, dout, lse, delta, dq, dk, dv, pieces, runs, visits, turns, counters, scale, CELLS,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr,
    ADD: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """dK and dV of every tile in `pieces`, stored or added, and dQ added to a sum.

    q, k, v, dout, dq, dk, dv are descriptors of [B, H, L, D]. lse and delta are descriptors of [B * H, L]; runs
    begin at multiples of 4 rows, because TMA reads from multiples of 16 bytes. A program takes SHARE of the GROUP query
    heads of a key/value head. ORDERED: adds to dQ wait for their turn (`turns.py`).
    """
    WIDTH: gl.constexpr = k.block_type.shape[3]
    SLOTS: gl.constexpr = 2 if WIDTH == 128 else 4
    PARTS: gl.constexpr = WIDTH // 32
    dtype: gl.constexpr = k.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, WIDTH], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], dtype)
    sums: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 64], gl.float32)
    per_row: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    signal: gl.constexpr = mbarrier.MBarrierLayout()
    s_k = gl.allocate_shared_memory(dtype, [KEYS, WIDTH], tile)
    s_v = gl.allocate_shared_memory(dtype, [KEYS, WIDTH], tile)
    s_q = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, WIDTH], tile)
    s_do = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, WIDTH], tile)
    s_lse = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], per_row)
    s_delta = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], per_row)
    s_ds = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, ROWS], square)
    s_dq = gl.allocate_shared_memory(gl.float32, [PARTS, ROWS, 64], sums)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], signal)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], signal)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], signal)
    dq_full = gl.allocate_shared_memory(gl.int64, [PARTS, 1], signal)
    dq_empty = gl.allocate_shared_memory(gl.int64, [PARTS, 1], signal)
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
        (compute, (0, dk, dv, scale, keys, ring, s_ds, adds, pieces, runs, GROUPS, GROUP, SHARE, ADD)),
        (compute, (1, dk, dv, scale, keys, ring, s_ds, adds, pieces, runs, GROUPS, GROUP, SHARE, ADD)),
        (load, (q, k, v, dout, lse, delta, keys, ring, pieces, runs, GROUPS, GROUP, SHARE)),
        (add, (dq, adds, pieces, runs, visits, turns, counters, CELLS, GROUPS, GROUP, SHARE, ORDERED)),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


@gluon.jit
def load(
    q, k, v, dout, lse, delta, keys, ring, pieces, runs, GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr
):  # fmt: skip
    """Keys and values once, then blocks of rows as fast as they are used up."""
    s_k, s_v, kv_full = keys
    s_q, s_do, s_lse, s_delta, full, empty = ring
    i_b, i_g, head0, key0, first, end = place(pieces, GROUPS, GROUP, SHARE)
    mbarrier.expect(kv_full, 2 * k.block_type.nbytes)
    fetch(k, [i_b, i_g, key0, 0], kv_full, s_k)
    fetch(v, [i_b, i_g, key0, 0], kv_full, s_v)
    slot, phase = 0, 1
    for i_run in range(first, end):
        start, length, head, tail, _, _, _, _ = run_at(runs, i_run)
        for i_h in range(head0, head0 + SHARE):
            i_row = i_b * GROUPS * GROUP + i_h
            for n in range(gl.cdiv(length, BLOCK)):
                row = start + block_at(n, length, head, tail)
                for step in gl.static_range(2):
                    i, j = slot + step, row + step * ROWS
                    mbarrier.wait(empty.index(i), phase)
                    mbarrier.expect(full.index(i), 2 * q.block_type.nbytes + 8 * ROWS)
                    fetch(q, [i_b, i_h, j, 0], full.index(i), s_q.index(i))
                    fetch(lse, [i_row, j], full.index(i), s_lse.index(i))
                    fetch(dout, [i_b, i_h, j, 0], full.index(i), s_do.index(i))
                    fetch(delta, [i_row, j], full.index(i), s_delta.index(i))
                slot, phase = next_pair(slot, phase, s_q.shape[0])


@gluon.jit
def compute(
    HALF: gl.constexpr, dk, dv, scale, keys, ring, s_ds, adds, pieces, runs,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """One half of the tile's keys: their dK and dV, and one half of dQ of every block."""
    s_k, s_v, kv_full = keys
    s_dq, _, dq_empty = adds
    _, _, _, _, first, end = place(pieces, GROUPS, GROUP, SHARE)
    WIDTH: gl.constexpr = s_k.shape[1]
    SLOTS: gl.constexpr = ring[0].shape[0]
    block: gl.constexpr = wide_block if WIDTH == 128 else narrow_block
    b_dk = gl.zeros([64, WIDTH], gl.float32, product_layout(WIDTH))
    b_dv = gl.zeros([64, WIDTH], gl.float32, product_layout(WIDTH))
    mbarrier.wait(kv_full, 0)
    my_k, my_v = s_k.slice(HALF * 64, 64), s_v.slice(HALF * 64, 64)
    if WIDTH == 64:  # there are registers to spare, and shared memory is read less
        KEYS_LEFT: gl.constexpr = gl.DotOperandLayout(0, product_layout(ROWS), k_width=2)
        my_k, my_v = my_k.load(KEYS_LEFT), my_v.load(KEYS_LEFT)
    slot, phase = 0, 0
    for i_run in tl.range(first, end, disable_licm=True):
        _, length, head, tail, _, _, _, _ = run_at(runs, i_run)
        for _ in tl.range(SHARE, disable_licm=True):
            for n in tl.range(gl.cdiv(length, BLOCK), disable_licm=True):
                mask = (n >= (tail - head) // BLOCK, runs, i_run, block_at(n, length, head, tail))
                b_dk, b_dv = block(
                    HALF, slot, phase, my_k, my_v, s_k, ring, s_ds, adds, b_dk, b_dv, scale, mask
                )  # fmt: skip
                slot, phase = next_pair(slot, phase, SLOTS)

    # Parts of dQ are freed in pairs, one of either warpgroup: when these are free, all of them are.
    for part in gl.static_range(HALF, WIDTH // 32, 2):
        mbarrier.wait(dq_empty.index(part), (phase if SLOTS == 2 else slot >> 1) ^ 1)
    sums: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, WIDTH], gl.float32)
    s_out = viewed(s_dq, gl.float32, [2, 64, WIDTH], sums).index(HALF)
    i_b, i_g, _, key0, _, _ = place(pieces, GROUPS, GROUP, SHARE)
    put(dv, b_dv, s_out, [i_b, i_g, key0 + HALF * 64, 0], ADD)
    put(dk, b_dk * scale, s_out, [i_b, i_g, key0 + HALF * 64, 0], ADD)


@gluon.jit
def add(
    dq, adds, pieces, runs, visits, turns, counters, CELLS,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """The parts of dQ of every block, as they come, to the sum in memory."""
    s_dq, dq_full, dq_empty = adds
    i_b, _, head0, _, first, end = place(pieces, GROUPS, GROUP, SHARE)
    PARTS: gl.constexpr = s_dq.shape[0]
    phase = 0
    for i_run in range(first, end):
        start, length, head, tail, _, _, _, _ = run_at(runs, i_run)
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
def place(pieces, GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr):
    """Batch, key/value head, first query head, first key, first run and end of the runs of this program."""
    SHARES: gl.constexpr = GROUP // SHARE
    p_piece = pieces + 4 * gl.program_id(0)
    i_share = gl.load(p_piece)
    i_bg = i_share // SHARES
    i_g = i_bg % GROUPS
    head0 = i_g * GROUP + i_share % SHARES * SHARE
    return i_bg // GROUPS, i_g, head0, gl.load(p_piece + 1), gl.load(p_piece + 2), gl.load(p_piece + 3)


@gluon.jit
def block_at(n, length, head, tail):
    """Where the n-th block of a run begins, in the order of the walk: those without a mask, then the others, last rows
    first. So programs that run side by side come to the same rows at about the same time, earlier tiles first."""
    whole = (tail - head) // BLOCK
    masked = (gl.cdiv(length, BLOCK) - 1 - n) * BLOCK
    return gl.where(n < whole, tail - (n + 1) * BLOCK, gl.where(masked < head, masked, masked - head + tail))


@gluon.jit
def next_pair(slot, phase, SLOTS: gl.constexpr):
    """The next two slots of the ring, and the phase of their barriers, which changes with every round."""
    if SLOTS == 2:
        return slot, phase ^ 1
    else:
        return slot ^ 2, gl.where(slot == 0, phase, phase ^ 1)


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
