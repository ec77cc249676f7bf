"""FlashAttention forward over segments for Hopper GPUs (sm_90), in Gluon: `triton_forward`, with a role for every warp.

A program stays on its multiprocessor and works on one tile of query rows after the other (`hopper_tile.locate`). One
warp only copies (`hopper_copy`). Each of two or three warpgroups owns 64 rows of the tile: the same rows of a head of
its own, where that many heads share keys, so that a tile is no taller than it must be, or else rows of the same head.
In step j it starts Q K_j^T and P_(j-1) V_(j-1) together and computes P_j when both are done, while the matrix units go
on with the steps of the other warpgroups; they take turns (FlashAttention-3, arXiv:2407.08608, section 3.1):

    matrix units      QK_j  PV_(j-1) | steps of the others | QK_(j+1)  PV_j | steps of the others
    this warpgroup                   | P_j ----------|                      | P_(j+1) ------|

So values lag one block behind keys, and a slot of the ring of buffers holds K_j and V_(j-1). From one tile to the next
nothing changes: P V of the last block runs beside the first scores of the next tile.

Names as in `triton_forward`; smem: buffers in shared memory; full, empty: their barriers.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportCallIssue=false, reportOperatorIssue=false

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_copy import copy_blocks
from .hopper_rows import finish, sight, start
from .hopper_scores import blank, hide, shrink, unpack, weigh
from .hopper_tile import LOG2E, advance, locate, named_arrive, named_sync, product_layout, rounds_of, run_at

__all__ = ["hopper_forward_kernel"]

TURN = gl.constexpr(9)  # the first of the named barriers at which warpgroups wait for their turns
TWO = gl.constexpr(256)  # threads at such a barrier: one warpgroup that waits, one that lets it go on


@gluon.jit(do_not_specialize=["LENGTH", "SHARED", "SLOT", "PATIENCE"])
def hopper_forward_kernel(
    q, k, v, out, lse, before, pieces, runs, scale, LENGTH,
    far_k, far_v, flags, error, epoch, SHARED, SLOT, PATIENCE: "i64",  # noqa: F821  # pyright: ignore[reportUndefinedVariable]
    out_strides, lse_strides, before_strides,
    HEADS: gl.constexpr, GROUP: gl.constexpr, TOGETHER: gl.constexpr, E: gl.constexpr,
    PARTS: gl.constexpr, BUFFERS: gl.constexpr, SLOTS: gl.constexpr, REGISTERS: gl.constexpr, KEEP: gl.constexpr,
    MERGE: gl.constexpr, WINDOW: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """out and lse of all pieces of work. q, k, v are descriptors of [B, H, L, D].

    MERGE: `before` and `lse` hold what was seen before. WAIT: keys from SLOT on are in far_k and far_v, and there when
    the flag says so (`await_flag`) that SHARED key/value heads of a slot have.
    TOGETHER heads share a tile, and keys. PARTS warpgroups; BUFFERS for the queries of as many tiles, SLOTS in the
    ring; REGISTERS for each thread of all warpgroups but the first, which gets what is left. KEEP: queries are
    multiplied from registers.
    """
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
    work = pieces, runs
    arrival = far_k, far_v, flags, error, epoch, SHARED, SLOT, PATIENCE
    result = out, lse, before, out_strides, lse_strides, before_strides
    rows = queries, ring, work, result, error, scale, LENGTH
    copies = q, k, v, queries, ring, work, arrival
    if PARTS == 2:
        gl.warp_specialize(
            [
                (attend_rows, (0, rows, HEADS, TOGETHER, E, PARTS, KEEP, MERGE, WINDOW, WAIT)),
                (attend_rows, (1, rows, HEADS, TOGETHER, E, PARTS, KEEP, MERGE, WINDOW, WAIT)),
                (copy_blocks, (copies, HEADS, GROUP, TOGETHER, PARTS, WAIT)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (attend_rows, (0, rows, HEADS, TOGETHER, E, PARTS, KEEP, MERGE, WINDOW, WAIT)),
                (attend_rows, (1, rows, HEADS, TOGETHER, E, PARTS, KEEP, MERGE, WINDOW, WAIT)),
                (attend_rows, (2, rows, HEADS, TOGETHER, E, PARTS, KEEP, MERGE, WINDOW, WAIT)),
                (copy_blocks, (copies, HEADS, GROUP, TOGETHER, PARTS, WAIT)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 32],
        )


@gluon.jit
def attend_rows(
    PART: gl.constexpr, operands,
    HEADS: gl.constexpr, TOGETHER: gl.constexpr, E: gl.constexpr, PARTS: gl.constexpr, KEEP: gl.constexpr,
    MERGE: gl.constexpr, WINDOW: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 rows of every tile, those from ROW0 on, of the (PART mod TOGETHER)-th head."""
    queries, ring, work, result, error, scale, LENGTH = operands
    q_smem, q_full, q_empty = queries
    k_smem, v_smem, full, empty = ring
    pieces, runs = work
    BUFFERS: gl.constexpr = q_smem.shape[0] // PARTS
    ROWS: gl.constexpr = q_smem.shape[1]
    ROW0: gl.constexpr = PART // TOGETHER * ROWS  # of the tile's rows
    SLOTS: gl.constexpr = k_smem.shape[0]
    KEYS: gl.constexpr = k_smem.shape[1]
    BLOCK_E: gl.constexpr = v_smem.shape[2]
    dtype: gl.constexpr = k_smem.dtype
    S: gl.constexpr = product_layout(KEYS)
    OUT: gl.constexpr = product_layout(BLOCK_E)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    scale_log2 = scale * LOG2E
    slot = 0
    phase = 0
    buffer = 0
    q_phase = 0
    if PART == PARTS - 1:
        named_arrive(TURN, TWO)
    b_acc = gl.zeros([ROWS, BLOCK_E], gl.float32, OUT)
    b_pair, b_m, b_l = blank(gl.zeros([ROWS, KEYS], gl.float32, S))
    b_shrink = gl.full_like(b_l, 1.0)
    last_bh = -1  # the tile whose last product is still to come; none yet
    last_row0 = LENGTH
    rounds = rounds_of(pieces)
    bh0, tile0, begin, end = locate(0, pieces)
    length = length_of(runs, gl.where(begin < end, begin, 0))
    for i_round in tl.range(rounds, disable_licm=True):
        following = gl.minimum(i_round + 1, rounds - 1)
        next_bh0, next_tile0, next_begin, next_end = locate(following, pieces)
        i_bh, row0 = bh0 + PART % TOGETHER, tile0 + ROW0
        if begin < end:
            _, _, head, tail, shift, low, high, window = run_at(runs, begin)
            at = buffer * PARTS + PART
            mbarrier.wait(q_full.index(at), q_phase)
            if KEEP:
                q = q_smem.index(at).load(gl.DotOperandLayout(operand_index=0, parent=S, k_width=2))
            else:
                q = q_smem.index(at)
            mbarrier.wait(full.index(slot), phase)
            b_acc = shrink(b_acc, b_shrink)
            if MERGE:  # registers do not suffice for the old tile beside a new one that is not empty
                acc = warpgroup_mma(unpack(b_pair, dtype, OUT), v_smem.index(slot), b_acc, is_async=True)
                b_acc = warpgroup_mma_wait(0, deps=(acc,))
                finish(b_acc, b_m, b_l, result, error, last_bh, last_row0, LENGTH, HEADS, E, WAIT)
                b_acc, b_m, b_l = start(b_acc, b_m, result, i_bh, row0, LENGTH, HEADS, E, MERGE)
                named_sync(TURN + PART, TWO)
                s = score(q, k_smem.index(slot), S)
                named_arrive(TURN + (PART + 1) % PARTS, TWO)
                b_s = warpgroup_mma_wait(0, deps=(s,))
            else:
                named_sync(TURN + PART, TWO)
                s = score(q, k_smem.index(slot), S)
                acc = warpgroup_mma(unpack(b_pair, dtype, OUT), v_smem.index(slot), b_acc, is_async=True)
                named_arrive(TURN + (PART + 1) % PARTS, TWO)
                b_s = warpgroup_mma_wait(1, deps=(s,))
                b_acc = warpgroup_mma_wait(0, deps=(acc,))
                finish(b_acc, b_m, b_l, result, error, last_bh, last_row0, LENGTH, HEADS, E, WAIT)
                b_acc, b_m, b_l = start(b_acc, b_m, result, i_bh, row0, LENGTH, HEADS, E, MERGE)
            if (head > 0) | (tail < KEYS):
                last_key, oldest_key = sight(length, shift, low, high, window, ROW0, ROWS, ROW)
                b_s = hide(b_s, last_key, oldest_key, WINDOW)
            mbarrier.arrive(empty.index(slot), count=1)
            if KEEP:  # not before a product has read them: a load is under way for longer than a barrier takes
                mbarrier.arrive(q_empty.index(at), count=1)
            slot, phase = advance(slot, phase, SLOTS)
            b_pair, b_m, b_l, b_shrink = weigh(b_s, b_m, b_l, scale_log2, dtype, True)
            for i_run in tl.range(begin, end, disable_licm=True):
                after = gl.where(i_run + 1 < end, i_run + 1, gl.where(next_begin < next_end, next_begin, i_run))
                next_length = length_of(runs, after)
                _, _, head, tail, shift, low, high, window = run_at(runs, i_run)
                for j in tl.range(gl.where(i_run == begin, KEYS, 0), length, KEYS, disable_licm=True):
                    mbarrier.wait(full.index(slot), phase)
                    b_acc = shrink(b_acc, b_shrink)
                    named_sync(TURN + PART, TWO)
                    s = score(q, k_smem.index(slot), S)
                    acc = warpgroup_mma(unpack(b_pair, dtype, OUT), v_smem.index(slot), b_acc, is_async=True)
                    named_arrive(TURN + (PART + 1) % PARTS, TWO)
                    b_s = warpgroup_mma_wait(1, deps=(s,))
                    if (j < head) | (j >= tail):
                        last_key, oldest_key = sight(length, shift, low, high, window, ROW0, ROWS, ROW)
                        b_s = hide(b_s, last_key - j, oldest_key - j, WINDOW)
                    b_acc = warpgroup_mma_wait(0, deps=(acc,))
                    mbarrier.arrive(empty.index(slot), count=1)
                    slot, phase = advance(slot, phase, SLOTS)
                    b_pair, b_m, b_l, b_shrink = weigh(b_s, b_m, b_l, scale_log2, dtype, False)
                length = next_length
            if not KEEP:
                mbarrier.arrive(q_empty.index(at), count=1)
            buffer, q_phase = advance(buffer, q_phase, BUFFERS)
            last_bh = i_bh
            last_row0 = row0
        else:  # nothing to see: out 0 and lse -inf, or what they were
            b_old_acc, b_old_m, b_old_l = start(b_acc, b_m, result, i_bh, row0, LENGTH, HEADS, E, MERGE)
            finish(b_old_acc, b_old_m, b_old_l, result, error, i_bh, row0, LENGTH, HEADS, E, WAIT)
            length = length_of(runs, gl.where(next_begin < next_end, next_begin, 0))
        bh0, tile0, begin, end = next_bh0, next_tile0, next_begin, next_end
    if last_bh >= 0:
        mbarrier.wait(full.index(slot), phase)
        b_acc = shrink(b_acc, b_shrink)
        acc = warpgroup_mma(unpack(b_pair, dtype, OUT), v_smem.index(slot), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=(acc,))
        finish(b_acc, b_m, b_l, result, error, last_bh, last_row0, LENGTH, HEADS, E, WAIT)
    if PART == 0:
        named_sync(TURN, TWO)


@gluon.jit
def length_of(runs, i_run):
    """The length of a run, by which the walk goes on, and so looked up while the run before is worked on."""
    return gl.load(runs + 8 * i_run + 1)


@gluon.jit
def score(q, k, SCORES: gl.constexpr):
    """Starts Q K^T."""
    ROWS: gl.constexpr = q.shape[0]
    KEYS: gl.constexpr = k.shape[0]
    b_zero = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    return warpgroup_mma(q, k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
