"""The copying warp of the Hopper forward: it brings what the warpgroups read, in their order, as soon as there is room.

All copies are done by TMA, which says by itself when they are complete, at the barriers `full`. That a buffer is free
again is what the warpgroups say, at `empty`. The warp runs ahead of them, from one tile into the next, so nobody waits
for memory but at the very start.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportCallIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_tile import advance, await_flag, fetch, flag_of, locate, rounds_of

__all__ = ["copy_blocks"]


@gluon.jit
def copy_blocks(
    operands,
    HEADS: gl.constexpr, GROUP: gl.constexpr, TOGETHER: gl.constexpr, PARTS: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """Queries of every tile, and its blocks of keys and values: in one slot the keys of a block and the values of the
    one before, be it of the tile before."""
    q, k, v, queries, ring, work, arrival = operands
    q_smem, q_full, q_empty = queries
    k_smem, v_smem, full, empty = ring
    pieces, runs = work
    far_k, far_v, flags, error, epoch, SHARED, SLOT, PATIENCE = arrival
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
    known = 0  # which of the first 32 flags are up: a look takes as long as a step
    for i_round in range(rounds_of(pieces)):
        bh0, row0, begin, end = locate(i_round, pieces)
        i_b = bh0 // HEADS
        i_h = bh0 % HEADS
        i_g = i_h // GROUP
        for i_run in range(begin, end):
            start = gl.load(runs + 8 * i_run)
            if WAIT:
                on_its_way = start >= SLOT
                if on_its_way:
                    i_flag = flag_of(i_g, start, SHARED, SLOT, HEADS // GROUP)
                    bit = gl.where(i_flag < 32, 1 << (i_flag & 31), 0)
                    if known & bit == 0:
                        await_flag(flags + i_flag, error, gl.load(epoch), PATIENCE, i_flag)
                        known |= bit
            for j in range(0, gl.load(runs + 8 * i_run + 1), KEYS):
                mbarrier.wait(empty.index(slot), phase)
                if last >= 0:
                    mbarrier.expect(full.index(slot), K_BYTES + V_BYTES)
                    fetch_keys(v, far_v, (last_b, last_g, last), full.index(slot), v_smem.index(slot), SLOT, WAIT)
                else:
                    mbarrier.expect(full.index(slot), K_BYTES)
                fetch_keys(k, far_k, (i_b, i_g, start + j), full.index(slot), k_smem.index(slot), SLOT, WAIT)
                slot, phase = advance(slot, phase, SLOTS)
                last = start + j
                last_b = i_b
                last_g = i_g
                if (i_run == begin) & (j == 0):
                    for i in gl.static_range(PARTS):
                        at = buffer * PARTS + i
                        mbarrier.wait(q_empty.index(at), q_phase)
                        mbarrier.expect(q_full.index(at), q.block_type.nbytes)
                        place = [i_b, i_h + i % TOGETHER, row0 + i // TOGETHER * ROWS, 0]
                        fetch(q, place, q_full.index(at), q_smem.index(at))
                    buffer, q_phase = advance(buffer, q_phase, BUFFERS)
    if last >= 0:
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), V_BYTES)
        fetch_keys(v, far_v, (last_b, last_g, last), full.index(slot), v_smem.index(slot), SLOT, WAIT)


@gluon.jit
def fetch_keys(near, far, place, full, smem, SLOT, WAIT: gl.constexpr):
    """Starts to copy a block: the first slot of the axis is `near`, and the others are `far`."""
    i_b, i_g, key = place
    if WAIT:
        if key < SLOT:
            fetch(near, [i_b, i_g, key, 0], full, smem)
        else:
            fetch(far, [i_b, i_g, key - SLOT, 0], full, smem)
    else:
        fetch(near, [i_b, i_g, key, 0], full, smem)
