"""FlashAttention backward over segments for Hopper, in Gluon: dK, dV and dQ in one kernel, five products a block.

With the final lse and delta = rowsum(dO * O) every block stands for itself (arXiv:2307.08691, section 3.1.2):

    P = exp(scale Q K^T - lse)    dS = P (dO V^T - delta)    dV = P^T dO    dK = scale dS^T Q    dQ = scale dS K

A program owns 128 keys of one key/value head and walks the rows that see them, head by head, so dK and dV are summed in
registers by one owner in a fixed order. Its warps do different things (arXiv:2407.08608, section 3.1): one loads steps
of 64 rows of Q and dO, two warpgroups compute for 64 keys each, a third computes dQ for all of them, and one warp adds
that to the sum in memory. A step in the life of these warpgroups:

    keys 0..63      S = K Q^T | P = exp(S) | dP = V dO^T | dS | dV += P^T dO | dK += dS^T Q
    keys 64..127           S = K Q^T | P = exp(S) | dP = V dO^T | dS | dV += P^T dO | dK += dS^T Q
    rows                      dQ = dS K of the step before         | to the one that adds it  |

Blocks are transposed, [keys, rows], so that P^T and dS^T already lie where their products want their left operand.
Only dQ needs all keys: dS goes through shared memory. Nobody waits for anybody but through barriers in memory, so the
three drift apart, and one computes exponentials while the matrix units work for another. What limits the kernel is
shared memory, 128 bytes a clock: see docs/kernels.md.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOptionalMemberAccess=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from . import hopper
from .hopper_add import await_turn, reduce_add, reduced, viewed, write
from .hopper_prepare import DELTA, PIECES
from .hopper_steps import key_sums, query_sums, weights
from .hopper_tile import advance, await_flag, fetch, flag_of, meet, read_anew, run_at
from .hopper_walk import BLOCK, ROWS, block_at, masks_at, place, steps_of, visit

__all__ = ["hopper_backward_kernel"]

KEYS = gl.constexpr(128)  # of a tile
PARTS = gl.constexpr(2)  # of dQ on their way
SOURCES = gl.constexpr(hopper.SOURCES)


@gluon.jit(do_not_specialize=["CELLS", "SHARED", "SLOT", "PATIENCE"])
def hopper_backward_kernel(
    q, k, v, dout, pieces, places, walks, dq, dk, dv, order, runs, visits, turns, counters, scale, scale_log2, CELLS,
    far_k, far_v, flags, error, epoch, SHARED, SLOT, PATIENCE: "i64",  # noqa: F821  # pyright: ignore[reportUndefinedVariable]
    home0, home1, home2, home3, home4, home5, home6, home7, shared,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, ADD: gl.constexpr, ORDERED: gl.constexpr,
    WAIT: gl.constexpr,
):  # fmt: skip
    """dK and dV of every tile in `order`, stored or added, and dQ added to a sum.

    q, k, v, dout, dq, dk, dv are descriptors of [B, H, L, D], pieces of [heads, L, PIECES] (`hopper_prepare.py`),
    places from `hopper_backward_launch.places`, and walks of the lines of `runs`. A program takes SHARE of the GROUP
    query heads of a key/value head. ADD: dk and dv are sums already. ORDERED: adds to dQ wait for their turn
    (`turns.py`). WAIT: keys from SLOT on are in far_k and far_v, and there when the flag says so (`await_flag`) that
    SHARED key/value heads of a slot have; dK and dV of own keys go to `home0` (`deliver`), of those in the first such
    slot to `home1`, and so on.
    """
    WIDTH: gl.constexpr = k.block_type.shape[3]
    SLOTS: gl.constexpr = 4 if WIDTH == 64 else 2  # for steps of rows and for their dS
    dtype: gl.constexpr = k.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, WIDTH], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, PIECES], dtype)
    sums: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 64], gl.float32)
    signal: gl.constexpr = mbarrier.MBarrierLayout()
    s_k = gl.allocate_shared_memory(dtype, [KEYS, WIDTH], tile)
    s_v = gl.allocate_shared_memory(dtype, [KEYS, WIDTH], tile)
    s_q = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, WIDTH], tile)
    s_do = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, WIDTH], tile)
    s_pieces = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, PIECES], narrow)
    s_weights = gl.allocate_shared_memory(dtype, [2, ROWS, PIECES], narrow)
    s_place = gl.allocate_shared_memory(gl.int32, [SLOTS, 8, 4], places.layout)
    s_walk = gl.allocate_shared_memory(gl.int32, [SLOTS, 4, 8], walks.layout)
    s_ds = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, ROWS], square)
    s_dq = gl.allocate_shared_memory(gl.float32, [PARTS, ROWS, 64], sums)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], signal)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], signal)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], signal)
    ds_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], signal)
    ds_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], signal)
    dq_full = gl.allocate_shared_memory(gl.int64, [PARTS, 1], signal)
    dq_empty = gl.allocate_shared_memory(gl.int64, [PARTS, 1], signal)
    over = gl.allocate_shared_memory(gl.int64, [1], signal)
    stored = gl.allocate_shared_memory(gl.int64, [1], signal)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(over, count=2)
    mbarrier.init(stored, count=2)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=1)
    for i in gl.static_range(PARTS):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_empty.index(i), count=1)
    s_weights.index(0).store(weights(0, dtype))
    s_weights.index(1).store(weights(DELTA, dtype))
    fence_async_shared()

    tensors = (q, k, v, dout, pieces, places, walks)
    keys = (s_k, s_v, kv_full)
    ring = (s_q, s_do, s_pieces, s_weights, s_place, s_walk, full, empty)
    slopes = (s_ds, ds_full, ds_empty)
    adds = (s_dq, dq_full, dq_empty)
    scales = (scale, scale_log2)
    results = (dk, dv)
    work = (order, runs)
    arrival = (far_k, far_v, flags, error, epoch, SHARED, SLOT, PATIENCE)
    homes = (home0, home1, home2, home3, home4, home5, home6, home7)
    ends = (results, homes, SLOT, over, shared, stored)
    # So nothing is spilled: registers of warps that copy, and the role of the warpgroup that the kernel begins with.
    SINGLE: gl.constexpr = 32
    FIRST: gl.constexpr = 2 if dk.dtype == gl.float32 else 0
    SECOND: gl.constexpr = (FIRST + 1) % 3
    THIRD: gl.constexpr = (FIRST + 2) % 3
    gl.warp_specialize([
        (compute, (FIRST, scales, keys, ring, slopes, adds, ends, work, GROUPS, GROUP, SHARE, ADD, WAIT)),
        (compute, (SECOND, scales, keys, ring, slopes, adds, ends, work, GROUPS, GROUP, SHARE, ADD, WAIT)),
        (compute, (THIRD, scales, keys, ring, slopes, adds, ends, work, GROUPS, GROUP, SHARE, ADD, WAIT)),
        (load, (tensors, keys, ring, arrival, ends, work, GROUPS, GROUP, SHARE, ORDERED, WAIT)),
        (add, (dq, adds, work, visits, turns, counters, CELLS, GROUPS, GROUP, SHARE, ORDERED, WIDTH // 64)),
    ], [4, 4, 1, 1], [208, 96 - SINGLE if THIRD == 2 else 208, SINGLE, SINGLE])  # fmt: skip


@gluon.jit
def compute(
    ROLE: gl.constexpr, scales, keys, ring, slopes, adds, ends, work,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, ADD: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """One of the three warpgroups: dK and dV of the first or the second half of the tile's keys, or dQ."""
    scale, scale_log2 = scales
    order, runs = work
    steps = steps_of(order, runs, GROUPS, GROUP, SHARE)
    if ROLE == 2:
        query_sums(steps, keys, slopes, adds, scale)
    else:
        b_dk, b_dv = key_sums(ROLE, steps, keys, ring, slopes, scale_log2)
        store(ROLE, (b_dk * scale, b_dv), ring, ends, order, GROUPS, GROUP, SHARE, ADD, WAIT)


@gluon.jit
def load(
    tensors, keys, ring, arrival, ends, work,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, ORDERED: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """Keys and values once, then steps of rows as fast as they are used up, each with what its mask is made of: for
    either half of the keys where in its run it begins, or -ROWS where all is seen, and the run. That comes by TMA as
    well: of what a warp stores, only those lanes that arrive at a barrier may say that it is there."""
    q, k, v, dout, pieces, places, walks = tensors
    order, runs = work
    s_q, s_do, s_pieces, _weights, s_place, s_walk, full, empty = ring
    BYTES: gl.constexpr = (
        2 * q.block_type.nbytes + pieces.block_type.nbytes + places.block_type.nbytes + walks.block_type.nbytes
    )
    i_b, i_g, head0, key0, first, end = place(order, GROUPS, GROUP, SHARE)
    piece0 = i_b * GROUPS * GROUP + head0
    if load_keys(k, v, i_b, i_g, key0, keys, arrival, GROUPS, WAIT):
        piece0 = pieces.shape[0] - GROUP  # NaN, and so is what follows
    slot, phase = 0, 1
    for i_run in range(first, end):
        start, length, head, tail, _, _, _, _ = run_at(runs, i_run)
        blocks = gl.cdiv(length, BLOCK)
        for i_visit in range(blocks * SHARE):
            n, i_head = visit(i_visit, blocks, SHARE, ORDERED)
            i_h, block = head0 + i_head, block_at(n, length, head, tail)
            whole = n < (tail - head) // BLOCK
            for j in range(block, gl.minimum(block + BLOCK, length), ROWS):
                line = 0
                if not whole:
                    line = 4 * (j // ROWS) + masks_at(j, runs, i_run)
                mbarrier.wait(empty.index(slot), phase)
                here = full.index(slot)
                mbarrier.expect(here, BYTES)
                fetch(places, [line, 0], here, s_place.index(slot))
                fetch(walks, [i_run, 0], here, s_walk.index(slot))
                fetch(pieces, [piece0 + i_head, start + j, 0], here, s_pieces.index(slot))
                fetch(q, [i_b, i_h, start + j, 0], here, s_q.index(slot))
                fetch(dout, [i_b, i_h, start + j, 0], here, s_do.index(slot))
                slot, phase = advance(slot, phase, s_q.shape[0])
    if SHARE < GROUP:
        pass_on(order, ends, GROUPS, GROUP, SHARE)


@gluon.jit
def load_keys(k, v, i_b, i_g, key0, keys, arrival, GROUPS: gl.constexpr, WAIT: gl.constexpr):
    """The tile's keys and values; whether they are on their way and have not come in time."""
    far_k, far_v, flags, error, epoch, SHARED, SLOT, PATIENCE = arrival
    lost = False
    if WAIT:
        if key0 >= SLOT:
            i_flag = flag_of(i_g, key0, SHARED, SLOT, GROUPS)
            await_flag(flags + i_flag, error, gl.load(epoch), PATIENCE, i_flag)
            lost = gl.load(error, volatile=True) != 0
            fetch_keys(far_k, far_v, i_b, i_g, key0 - SLOT, keys)
        else:
            fetch_keys(k, v, i_b, i_g, key0, keys)
    else:
        fetch_keys(k, v, i_b, i_g, key0, keys)
    return lost


@gluon.jit
def fetch_keys(k, v, i_b, i_g, key0, keys):
    """Starts to copy them."""
    s_k, s_v, kv_full = keys
    mbarrier.expect(kv_full, 2 * k.block_type.nbytes)
    fetch(k, [i_b, i_g, key0, 0], kv_full, s_k)
    fetch(v, [i_b, i_g, key0, 0], kv_full, s_v)


@gluon.jit
def store(
    HALF: gl.constexpr, grads, ring, ends, order,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, ADD: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """dK and dV of one half of the tile's keys, by way of free memory, to where they belong. Of two programs that share
    a tile, one right after the other, the second adds once the first has stored: int32 `shared` [programs] counts that
    for the first."""
    results, homes, SLOT, over, shared, stored = ends
    dtype: gl.constexpr = results[0].dtype
    mbarrier.arrive(over, count=1)
    mbarrier.wait(over, 0)  # nobody reads Q and dO any more
    i_b, i_g, head0, key0, _, _ = place(order, GROUPS, GROUP, SHARE)
    first = head0 % GROUP == 0
    if SHARE < GROUP and not first:
        await_turn(shared + read_anew("%ctaid.x") - 1, 1)
    for number in gl.static_range(2):
        s_x = staged(grads[number], ring[HALF], dtype)
        onto = ADD or (SHARE < GROUP and not first)
        if WAIT:
            deliver(homes, number, i_b, i_g, key0 + HALF * 64, SLOT, s_x, onto)
        else:
            bring(results[number], [i_b, i_g, key0 + HALF * 64, 0], s_x, onto)
        tma.store_wait(0)
    if SHARE < GROUP and first:
        reduced()
        meet()  # every warp has stored a part of the tile, and one lane arrives
        mbarrier.arrive(stored, count=1)


@gluon.jit
def staged(b_x, s_free, dtype: gl.constexpr):
    """A tile in free memory, for TMA."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(b_x.shape, dtype)
    s_x = viewed(s_free, dtype, b_x.shape, layout)
    s_x.store(b_x.to(dtype))
    fence_async_shared()
    return s_x


@gluon.jit
def deliver(homes, number: gl.constexpr, i_b, i_g, key0, SLOT, s_x, onto):
    """Starts to bring a tile home, maybe into another GPU's memory: [2 B, H, L, D] for each source, dK of all sequences
    and then dV."""
    for i in gl.static_range(1 + SOURCES):
        if homes[i] is not None:  # noqa: SIM102  (for the compiler)
            if key0 // SLOT == i:
                bring(homes[i], [number * (homes[i].shape[0] // 2) + i_b, i_g, key0 % SLOT, 0], s_x, onto)


@gluon.jit
def bring(desc, coord, s_x, onto):
    """Starts to store a tile, or to add it `onto` what is there."""
    if onto:
        reduce_add(desc, coord, s_x)
    else:
        write(desc, coord, s_x)


@gluon.jit
def pass_on(order, ends, GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr):
    """Lets the second program of a tile add, when the first has stored."""
    _results, _homes, _SLOT, _over, shared, stored = ends
    _, _, head0, _, _, _ = place(order, GROUPS, GROUP, SHARE)
    if head0 % GROUP == 0:
        mbarrier.wait(stored, 0)
        gl.atomic_add(shared + read_anew("%ctaid.x"), 1, sem="release", scope="sys")


@gluon.jit
def add(
    dq, adds, work, visits, turns, counters, CELLS,
    GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, ORDERED: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """The parts of dQ, 64 columns of a step, as they come, to the sum in memory. At head dim 64 steps take turns with
    the buffers, and blocks of one step let these run on into the next block."""
    s_dq, dq_full, dq_empty = adds
    order, runs = work
    i_b, _, head0, _, first, end = place(order, GROUPS, GROUP, SHARE)
    part, phase = 0, 0
    for i_run in range(first, end):
        start, length, head, tail, _, _, _, _ = run_at(runs, i_run)
        blocks = gl.cdiv(length, BLOCK)
        if ORDERED:
            p_turns = turns + 2 * gl.load(visits + i_run)
            turn, next_turn = gl.load(p_turns), gl.load(p_turns + 1)
        for i_visit in range(blocks * SHARE):
            n, i_head = visit(i_visit, blocks, SHARE, ORDERED)
            i_h, block = head0 + i_head, block_at(n, length, head, tail)
            if ORDERED:
                p_counter = counters + (i_b * GROUPS * GROUP + i_h) * CELLS + (start + block) // BLOCK
                await_turn(p_counter, turn)
                touches_next = next_turn >= 0
                if touches_next:
                    await_turn(p_counter + 1, next_turn)
                p_turn = p_turns + 2 * visit(gl.minimum(i_visit + 1, blocks * SHARE - 1), blocks, SHARE, ORDERED)[0]
                turn, next_turn = gl.load(p_turn), gl.load(p_turn + 1)  # those of the next visit, in good time
            for j in range(block, gl.minimum(block + BLOCK, length), ROWS):
                for column in gl.static_range(COLUMNS):
                    mbarrier.wait(dq_full.index(part + column), phase)
                    reduce_add(dq, [i_b, i_h, start + j, column * 64], s_dq.index(part + column))
                for column in gl.static_range(COLUMNS):
                    tma.store_wait(COLUMNS - 1 - column)
                    mbarrier.arrive(dq_empty.index(part + column), count=1)
                part, phase = advance(part, phase, s_dq.shape[0] // COLUMNS)
            if ORDERED:
                reduced()
                gl.atomic_add(p_counter, 1, sem="release")
                if touches_next:
                    gl.atomic_add(p_counter + 1, 1, sem="release")
