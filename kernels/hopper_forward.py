"""FlashAttention forward over segments for Hopper GPUs (sm_90), in Gluon: `triton_forward`, with a role for every warp.

A program stays on its multiprocessor and works on one tile of query rows after the other (`hopper_tile.locate`). One
warp only copies: queries, and blocks of keys and values into a ring of buffers, by TMA. Each of the other warpgroups
owns 64 rows of the tile. In step j it issues Q K_j^T and P_(j-1) V_(j-1) together and computes P_j as soon as the
scores are there, while the matrix units go on with P V and then with the other warpgroup's step; the warpgroups take
turns (FlashAttention-3, arXiv:2407.08608, sections 3.1 and 3.2):

    matrix units      QK_j PV_(j-1) | other's step | QK_(j+1) PV_j | other's step
    this warpgroup         | P_j                   |      | P_(j+1)

So values lag one block behind keys, and a slot of the ring holds K_j and V_(j-1). A tile of n blocks takes n + 1 steps;
in the first there are no values and in the last no keys.

Names as in `triton_forward`; smem: buffers in shared memory, full and empty: barriers of a ring.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_rows import finish, sight, start
from .hopper_scores import add_up, centre, eighths, hide, hold_back, pack, shrink, unpack
from .hopper_tile import (
    LOG2E,
    LOWEST,
    advance,
    await_flag,
    fetch,
    locate,
    named_arrive,
    named_sync,
    product_layout,
    rounds_of,
    run_at,
)

__all__ = ["forward_kernel"]

TURN = gl.constexpr(9)  # the first of the named barriers at which warpgroups wait for their turns


@gluon.jit(do_not_specialize=["LENGTH", "TILES", "SIDE", "TOTAL", "EPOCH", "SLOT", "PATIENCE"])
def forward_kernel(
    q, k, v, out, lse, before, tiles, runs, scale, LENGTH, TILES, SIDE, TOTAL,
    flags, error, EPOCH, SLOT, PATIENCE: "i64",
    out_strides, lse_strides, before_strides,
    HEADS: gl.constexpr, GROUP: gl.constexpr, E: gl.constexpr, PARTS: gl.constexpr, SLOTS: gl.constexpr,
    MERGE: gl.constexpr, WINDOW: gl.constexpr, WAIT: gl.constexpr, TURNS: gl.constexpr, EMULATE: gl.constexpr,
    REGISTERS: gl.constexpr,    PIN: gl.constexpr, QREG: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """out and lse of all tiles, in TOTAL pieces of work. q, k, v are descriptors of [B, H, L, D]; with MERGE, `before`
    and `lse` hold what was seen before."""
    dtype: gl.constexpr = k.dtype
    ROWS: gl.constexpr = q.block_type.shape[2]
    KEYS: gl.constexpr = k.block_type.shape[2]
    BLOCK_D: gl.constexpr = k.block_type.shape[3]
    BLOCK_E: gl.constexpr = v.block_type.shape[3]
    Q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], dtype)
    K: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_D], dtype)
    V: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_E], dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(dtype, [BUFFERS * PARTS, ROWS, BLOCK_D], Q)
    k_smem = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, BLOCK_D], K)
    v_smem = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, BLOCK_E], V)
    q_full = gl.allocate_shared_memory(gl.int64, [BUFFERS * PARTS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS * PARTS, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    for i in gl.static_range(BUFFERS * PARTS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PARTS)
    fence_async_shared()
    queries = q_smem, q_full, q_empty
    ring = k_smem, v_smem, full, empty
    work = tiles, runs, TILES, SIDE, TOTAL
    arrival = flags, error, EPOCH, SLOT, PATIENCE
    result = out, lse, before, out_strides, lse_strides, before_strides
    if PARTS == 2:
        gl.warp_specialize(
            [
                (attend_rows, (0, queries, ring, work, result, error, scale, LENGTH, HEADS, E, MERGE, WINDOW, WAIT, TURNS, EMULATE, PARTS, PIN, QREG)),
                (attend_rows, (1, queries, ring, work, result, error, scale, LENGTH, HEADS, E, MERGE, WINDOW, WAIT, TURNS, EMULATE, PARTS, PIN, QREG)),
                (copy_blocks, (q, k, v, queries, ring, work, arrival, HEADS, GROUP, WAIT, PARTS)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (attend_rows, (0, queries, ring, work, result, error, scale, LENGTH, HEADS, E, MERGE, WINDOW, WAIT, TURNS, EMULATE, PARTS, PIN, QREG)),
                (attend_rows, (1, queries, ring, work, result, error, scale, LENGTH, HEADS, E, MERGE, WINDOW, WAIT, TURNS, EMULATE, PARTS, PIN, QREG)),
                (attend_rows, (2, queries, ring, work, result, error, scale, LENGTH, HEADS, E, MERGE, WINDOW, WAIT, TURNS, EMULATE, PARTS, PIN, QREG)),
                (copy_blocks, (q, k, v, queries, ring, work, arrival, HEADS, GROUP, WAIT, PARTS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 32],
        )


@gluon.jit
def copy_blocks(
    q, k, v, queries, ring, work, arrival,
    HEADS: gl.constexpr, GROUP: gl.constexpr, WAIT: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The copying warp: everything that the warpgroups will read, in their order, as soon as there is room."""
    q_smem, q_full, q_empty = queries
    k_smem, v_smem, full, empty = ring
    tiles, runs, TILES, SIDE, TOTAL = work
    flags, error, EPOCH, SLOT, PATIENCE = arrival
    BUFFERS: gl.constexpr = q_smem.shape[0] // PARTS
    ROWS: gl.constexpr = q_smem.shape[1]
    SLOTS: gl.constexpr = k_smem.shape[0]
    KEYS: gl.constexpr = k_smem.shape[1]
    K_BYTES: gl.constexpr = k.block_type.nbytes
    V_BYTES: gl.constexpr = v.block_type.nbytes
    slot = 0
    phase = 1  # that of a barrier which nobody has used yet counts as over
    buffer = 0
    q_phase = 1
    last = -1  # the block whose values come next; no block yet
    last_b = 0
    last_g = 0
    for i_round in range(rounds_of(TOTAL)):
        i_bh, row0, begin, end = locate(i_round, tiles, TILES, SIDE)
        i_b = i_bh // HEADS
        i_h = i_bh % HEADS
        i_g = i_h // GROUP
        for i_run in range(begin, end):
            start = gl.load(runs + 8 * i_run)
            if WAIT:
                i_flag = start // SLOT * (HEADS // GROUP) + i_g
                await_flag(flags + i_flag, error, EPOCH, PATIENCE, i_flag)
            for j in range(0, gl.load(runs + 8 * i_run + 1), KEYS):
                mbarrier.wait(empty.index(slot), phase)
                if last >= 0:
                    mbarrier.expect(full.index(slot), K_BYTES + V_BYTES)
                    fetch(v, [last_b, last_g, last, 0], full.index(slot), v_smem.index(slot))
                else:
                    mbarrier.expect(full.index(slot), K_BYTES)
                fetch(k, [i_b, i_g, start + j, 0], full.index(slot), k_smem.index(slot))
                slot, phase = advance(slot, phase, SLOTS)
                last = start + j
                last_b = i_b
                last_g = i_g
                if (i_run == begin) & (j == 0):
                    for i in gl.static_range(PARTS):
                        at = buffer * PARTS + i
                        mbarrier.wait(q_empty.index(at), q_phase)
                        mbarrier.expect(q_full.index(at), q.block_type.nbytes)
                        fetch(q, [i_b, i_h, row0 + i * ROWS, 0], q_full.index(at), q_smem.index(at))
                    buffer, q_phase = advance(buffer, q_phase, BUFFERS)
    if last >= 0:
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), V_BYTES)
        fetch(v, [last_b, last_g, last, 0], full.index(slot), v_smem.index(slot))


@gluon.jit
def attend_rows(
    PART: gl.constexpr, queries, ring, work, result, error, scale, LENGTH,
    HEADS: gl.constexpr, E: gl.constexpr, MERGE: gl.constexpr, WINDOW: gl.constexpr, WAIT: gl.constexpr,
    TURNS: gl.constexpr, EMULATE: gl.constexpr, PARTS: gl.constexpr, PIN: gl.constexpr, QREG: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 rows of every tile, the PART-th ones.

    Between tiles it goes on as within one: P V of a tile's last block runs beside the first scores of the next tile, and
    the rows are written while the other warpgroup has the matrix units.
    """
    q_smem, q_full, q_empty = queries
    k_smem, v_smem, full, empty = ring
    tiles, runs, TILES, SIDE, TOTAL = work
    BUFFERS: gl.constexpr = q_smem.shape[0] // PARTS
    ROWS: gl.constexpr = q_smem.shape[1]
    SLOTS: gl.constexpr = k_smem.shape[0]
    KEYS: gl.constexpr = k_smem.shape[1]
    BLOCK_E: gl.constexpr = v_smem.shape[2]
    dtype: gl.constexpr = k_smem.dtype
    S: gl.constexpr = product_layout(KEYS)
    O: gl.constexpr = product_layout(BLOCK_E)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    scale_log2 = scale * LOG2E
    slot = 0
    phase = 0
    buffer = 0
    q_phase = 0
    if TURNS and PART == PARTS - 1:
        named_arrive(TURN, 256)
    b_pair = pack(gl.zeros([ROWS, KEYS], gl.float32, S), dtype)
    b_acc = gl.zeros([ROWS, BLOCK_E], gl.float32, O)
    b_m = gl.full([ROWS], LOWEST, gl.float32, ROW)
    b_l = gl.sum(eighths(gl.zeros([ROWS, KEYS], gl.float32, S)), 1)
    b_shrink = gl.full([ROWS], 1.0, gl.float32, ROW)
    last_bh = -1  # the tile whose last product is still to come; none yet
    last_row0 = LENGTH
    rounds = rounds_of(TOTAL)
    i_bh, tile0, begin, end = locate(0, tiles, TILES, SIDE)
    for i_round in range(rounds):
        next_bh, next_tile0, next_begin, next_end = locate(gl.minimum(i_round + 1, rounds - 1), tiles, TILES, SIDE)
        row0 = tile0 + PART * ROWS
        if begin < end:
            start_key, length, head, tail, shift, low, high, window = run_at(runs, begin)
            last_key, oldest_key = sight(length, shift, low, high, window, PART * ROWS, ROWS, ROW)
            at = buffer * PARTS + PART
            mbarrier.wait(q_full.index(at), q_phase)
            if QREG:
                q = q_smem.index(at).load(gl.DotOperandLayout(operand_index=0, parent=S, k_width=2))
            else:
                q = q_smem.index(at)
            mbarrier.wait(full.index(slot), phase)
            b_acc = shrink(b_acc, b_shrink)
            if MERGE:  # registers do not suffice for the old tile beside a new one that is not empty
                acc = warpgroup_mma(unpack(b_pair, dtype, O), v_smem.index(slot), b_acc, is_async=True)
                b_acc = warpgroup_mma_wait(0, deps=(acc,))
                finish(b_acc, b_m, b_l, result, error, last_bh, last_row0, LENGTH, HEADS, E, WAIT)
                b_acc, b_m, b_l = start(b_acc, b_l, result, i_bh, row0, LENGTH, HEADS, E, MERGE, ROW)
                if TURNS:
                    named_sync(TURN + PART, 256)
                s = score(q, k_smem.index(slot), S)
                if TURNS:
                    named_arrive(TURN + (PART + 1) % PARTS, 256)
                b_s = warpgroup_mma_wait(0, deps=(s,))
                if (head > 0) | (tail < KEYS):
                    b_s = hide(b_s, last_key, oldest_key, WINDOW)
                b_p, b_m, b_shrink = centre(b_s, b_m, scale_log2, 0)
                b_l = add_up(b_l, b_p, b_shrink)
            else:
                if TURNS:
                    named_sync(TURN + PART, 256)
                s = score(q, k_smem.index(slot), S)
                acc = warpgroup_mma(unpack(b_pair, dtype, O), v_smem.index(slot), b_acc, is_async=True)
                if TURNS:
                    named_arrive(TURN + (PART + 1) % PARTS, 256)
                b_s = warpgroup_mma_wait(1, deps=(s,))
                if (head > 0) | (tail < KEYS):
                    b_s = hide(b_s, last_key, oldest_key, WINDOW)
                b_new_acc, b_new_m, b_new_l = start(b_acc, b_l, result, i_bh, row0, LENGTH, HEADS, E, MERGE, ROW)
                b_p, b_new_m, b_shrink = centre(b_s, b_new_m, scale_log2, 0)
                b_new_l = add_up(b_new_l, b_p, b_shrink)
                if PIN:
                    b_new_l = hold_back(b_new_l)
                b_acc = warpgroup_mma_wait(0, deps=(acc,))
                finish(b_acc, b_m, b_l, result, error, last_bh, last_row0, LENGTH, HEADS, E, WAIT)
                b_acc = b_new_acc
                b_m = b_new_m
                b_l = b_new_l
            mbarrier.arrive(empty.index(slot), count=1)
            if QREG:  # not before a product has read them: a load is under way for longer than a barrier takes
                mbarrier.arrive(q_empty.index(at), count=1)
            slot, phase = advance(slot, phase, SLOTS)
            b_pair = pack(b_p, dtype)
            for i_run in range(begin, end):
                start_key, length, head, tail, shift, low, high, window = run_at(runs, i_run)
                last_key, oldest_key = sight(length, shift, low, high, window, PART * ROWS, ROWS, ROW)
                for j in range(gl.where(i_run == begin, KEYS, 0), length, KEYS):
                    mbarrier.wait(full.index(slot), phase)
                    b_acc = shrink(b_acc, b_shrink)
                    if TURNS:
                        named_sync(TURN + PART, 256)
                    s = score(q, k_smem.index(slot), S)
                    acc = warpgroup_mma(unpack(b_pair, dtype, O), v_smem.index(slot), b_acc, is_async=True)
                    if TURNS:
                        named_arrive(TURN + (PART + 1) % PARTS, 256)
                    b_s = warpgroup_mma_wait(1, deps=(s,))
                    if (j < head) | (j >= tail):
                        b_s = hide(b_s, last_key - j, oldest_key - j, WINDOW)
                    b_p, b_m, b_shrink = centre(b_s, b_m, scale_log2, EMULATE)
                    b_l = add_up(b_l, b_p, b_shrink)
                    if PIN:
                        b_l = hold_back(b_l)
                    b_acc = warpgroup_mma_wait(0, deps=(acc,))
                    mbarrier.arrive(empty.index(slot), count=1)
                    slot, phase = advance(slot, phase, SLOTS)
                    b_pair = pack(b_p, dtype)
            if not QREG:
                mbarrier.arrive(q_empty.index(at), count=1)
            buffer, q_phase = advance(buffer, q_phase, BUFFERS)
            last_bh = i_bh
            last_row0 = row0
        else:  # nothing to see: out 0 and lse -inf, or what they were
            b_old_acc, b_old_m, b_old_l = start(b_acc, b_l, result, i_bh, row0, LENGTH, HEADS, E, MERGE, ROW)
            finish(b_old_acc, b_old_m, b_old_l, result, error, i_bh, row0, LENGTH, HEADS, E, WAIT)
        i_bh, tile0, begin, end = next_bh, next_tile0, next_begin, next_end
    if last_bh >= 0:
        mbarrier.wait(full.index(slot), phase)
        b_acc = shrink(b_acc, b_shrink)
        acc = warpgroup_mma(unpack(b_pair, dtype, O), v_smem.index(slot), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=(acc,))
        finish(b_acc, b_m, b_l, result, error, last_bh, last_row0, LENGTH, HEADS, E, WAIT)
    if TURNS and PART == 0:
        named_sync(TURN, 256)


@gluon.jit
def score(q, k, S: gl.constexpr):
    """Starts Q K^T."""
    ROWS: gl.constexpr = q.shape[0]
    KEYS: gl.constexpr = k.shape[0]
    b_zero = gl.zeros([ROWS, KEYS], gl.float32, S)
    return warpgroup_mma(q, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
