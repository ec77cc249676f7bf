"""EXPERIMENT"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .hopper_tile import advance, fetch, named_arrive, named_sync, run_at, tile_at

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3.4028234663852886e38)  # the maximum over nothing; -inf less -inf would be NaN
SLACK = gl.constexpr(8.0)


@gluon.constexpr_function
def product_layout(columns):
    """How one warpgroup holds 64 rows of a product: a row lies in four lanes, its columns in turns of eight."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def shrink_asm(n):
    n = getattr(n, "value", n)
    first, third = f"${2 * n}", f"${2 * n + 2}"
    test = f".reg .pred a, b; setp.neu.f32 a, {first}, 0f3F800000; setp.neu.f32 b, {third}, 0f3F800000; or.pred a, a, b;"
    vote = "vote.sync.any.pred a, a, 0xffffffff; @!a bra.uni SAME;"
    scale = " ".join(f"mul.f32 ${i}, ${n + i}, ${2 * n + i};" for i in range(n))
    return "{ " + test + " " + vote + " " + scale + " SAME: }"


@gluon.constexpr_function
def shrink_constraints(n):
    n = getattr(n, "value", n)
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.constexpr_function
def exp_asm(n, k):
    """n exponentials, k of them by polynomial"""
    n, k = getattr(n, "value", n), getattr(k, "value", k)
    out = ["{ .reg .f32 x, r, f, p; .reg .b32 e, g;"]
    for i in range(n):
        if i < n - k:
            out.append(f"ex2.approx.ftz.f32 ${i}, ${n + i};")
        else:
            out.append(
                f"max.f32 x, ${n + i}, 0fC2FC0000; add.rn.f32 r, x, 0f4B400000; sub.rn.f32 f, r, 0f4B400000; sub.rn.f32 f, x, f;"
                f"fma.rn.f32 p, f, 0f3D61FBAF, 0f3E786F0D; fma.rn.f32 p, p, f, 0f3F31798D; fma.rn.f32 p, p, f, 0f3F7FFB49;"
                f"mov.b32 e, r; shl.b32 e, e, 23; mov.b32 g, p; add.s32 g, e, g; mov.b32 $" + f"{i}, g;"
            )
    return " ".join(out) + " }"


@gluon.constexpr_function
def exp_constraints(n):
    n = getattr(n, "value", n)
    return ",".join(["=f"] * n + ["f"] * n)


@gluon.jit
def place(i_round, TILES, SIDE, TOTAL, HEADS: gl.constexpr):
    """(tile, batch, head) that this program works on in a round."""
    programs = gl.num_programs(0)
    i_p = gl.program_id(0)
    n = i_round * programs + gl.where(i_round % 2 == 0, i_p, programs - 1 - i_p)
    section = n // (TILES * SIDE)
    rest = n - section * (TILES * SIDE)
    i_tile = rest // SIDE
    i_bh = section * SIDE + rest - i_tile * SIDE
    return i_tile, i_bh // HEADS, i_bh % HEADS


@gluon.jit
def rounds_of(TOTAL):
    programs = gl.num_programs(0)
    i_p = gl.program_id(0)
    rounds = (TOTAL + programs - 1) // programs
    last = (rounds - 1) * programs + gl.where((rounds - 1) % 2 == 0, i_p, programs - 1 - i_p)
    return gl.where(last < TOTAL, rounds, rounds - 1)


@gluon.jit
def load_tiles(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
    tiles, runs, flags, error, EPOCH, SLOT, PATIENCE, TILES, SIDE, TOTAL,
    HEADS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The producer warp"""
    PARTS: gl.constexpr = q_smem.shape[0]
    ROWS: gl.constexpr = q_smem.shape[1]
    SLOTS: gl.constexpr = k_smem.shape[0]
    KEYS: gl.constexpr = k_smem.shape[1]
    K_BYTES: gl.constexpr = k_desc.block_type.nbytes
    V_BYTES: gl.constexpr = v_desc.block_type.nbytes
    slot = 0
    phase = 1
    q_phase = 1
    for i_round in range(rounds_of(TOTAL)):
        i_tile, i_b, i_h = place(i_round, TILES, SIDE, TOTAL, HEADS)
        i_g = i_h // GROUP
        row0, first, middle, end = tile_at(tiles, i_tile)
        if first < end:
            for i in gl.static_range(PARTS):
                mbarrier.wait(q_empty.index(i), q_phase)
                mbarrier.expect(q_full.index(i), q_desc.block_type.nbytes)
                fetch(q_desc, [i_b, i_h, row0 + i * ROWS, 0], q_full.index(i), q_smem.index(i))
            q_phase ^= 1
            run0 = gl.where(middle < end, middle, first)
            before = gl.load(runs + 6 * run0)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), K_BYTES)
            fetch(k_desc, [i_b, i_g, before, 0], full.index(slot), k_smem.index(slot))
            slot, phase = advance(slot, phase, SLOTS)
            for i in range(end - first):
                i_run = gl.where(middle + i < end, middle + i, first + middle + i - end)
                start = gl.load(runs + 6 * i_run)
                length = gl.load(runs + 6 * i_run + 1)
                for j in range(gl.where(i == 0, KEYS, 0), length, KEYS):
                    mbarrier.wait(empty.index(slot), phase)
                    mbarrier.expect(full.index(slot), K_BYTES + V_BYTES)
                    fetch(k_desc, [i_b, i_g, start + j, 0], full.index(slot), k_smem.index(slot))
                    fetch(v_desc, [i_b, i_g, before, 0], full.index(slot), v_smem.index(slot))
                    before = start + j
                    slot, phase = advance(slot, phase, SLOTS)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), V_BYTES)
            fetch(v_desc, [i_b, i_g, before, 0], full.index(slot), v_smem.index(slot))
            slot, phase = advance(slot, phase, SLOTS)


@gluon.constexpr_function
def pack_asm(dtype):
    name = {"bf16": "bf16", "fp16": "f16"}[str(getattr(dtype, "value", dtype))]
    return f"cvt.rn.{name}x2.f32 $0, $2, $1;"


@gluon.jit
def pack(b_p, dtype: gl.constexpr):
    b_low, b_high = gl.split(b_p.reshape([b_p.shape[0], b_p.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(pack_asm(dtype), "=r,f,f", [b_low, b_high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack(b_pair, dtype: gl.constexpr, LEFT: gl.constexpr):
    b_low = (b_pair & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    b_high = (b_pair >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(b_low, b_high).reshape([b_pair.shape[0], b_pair.shape[1] * 2]), LEFT)


@gluon.jit
def fold(b_x):
    """[R, 8, N/8] view such that axis 1 reduces inside a thread."""
    return b_x.reshape([b_x.shape[0], b_x.shape[1] // 8, 8])


@gluon.jit
def centre(b_s, b_m, scale_log2, EMULATE: gl.constexpr, SKIP: gl.constexpr, TREE: gl.constexpr):
    """P, and the maxima"""
    L: gl.constexpr = b_m.type.layout
    if TREE:
        b_top = gl.convert_layout(gl.max(gl.max(fold(b_s), 1), 1), L)
    else:
        b_top = gl.max(b_s, 1)
    b_new = gl.maximum(b_m, b_top * scale_log2)
    if SKIP:
        b_new = gl.where(b_new - b_m > SLACK, b_new, b_m)
    b_shrink = gl.exp2(b_m - b_new)
    b_x = b_s * scale_log2 - b_new[:, None]
    if EMULATE > 0:
        b_p = gl.inline_asm_elementwise(exp_asm(16, EMULATE), exp_constraints(16), [b_x], dtype=gl.float32, is_pure=True, pack=16)
    else:
        b_p = gl.exp2(b_x)
    return b_p, b_new, b_shrink


@gluon.jit
def add_up(b_l, b_p, b_shrink, LAZY: gl.constexpr):
    if LAZY:
        b_part = gl.sum(fold(b_p), 1)
        L: gl.constexpr = gl.SliceLayout(1, b_l.type.layout)
        return b_l * gl.convert_layout(b_shrink, L, assert_trivial=True)[:, None] + gl.convert_layout(b_part, b_l.type.layout, assert_trivial=True)
    else:
        return b_l * b_shrink + gl.sum(b_p, 1)


@gluon.jit
def shrink_rows(b_acc, b_shrink, SKIP: gl.constexpr):
    ACC: gl.constexpr = b_acc.type.layout
    b_by = gl.convert_layout(b_shrink, gl.SliceLayout(1, ACC))[:, None]
    if SKIP:
        N: gl.constexpr = b_acc.shape[0] * b_acc.shape[1] // 128
        b_all, b_acc = gl.broadcast(b_by, b_acc)
        return gl.inline_asm_elementwise(
            shrink_asm(N), shrink_constraints(N), [b_acc, b_all], dtype=gl.float32, is_pure=False, pack=N
        )
    else:
        return b_acc * b_by


@gluon.jit
def pin(b_l):
    N: gl.constexpr = 4 if len(b_l.shape) == 2 else 2
    return gl.inline_asm_elementwise(
        pin_asm(N), pin_constraints(N), [b_l], dtype=gl.float32, is_pure=False, pack=N
    )


@gluon.constexpr_function
def pin_asm(n):
    n = getattr(n, "value", n)
    return "{ .reg .pred a; setp.nan.f32 a, $" + f"{n}, ${n}; @a nanosleep.u32 1; " + " ".join(f"mov.b32 ${i}, ${n+i};" for i in range(n)) + " }"


@gluon.constexpr_function
def pin_constraints(n):
    n = getattr(n, "value", n)
    return ",".join(["=f"] * n + [str(i) for i in range(n)])


@gluon.jit
def hide(b_s, last_key, oldest_key, WINDOW: gl.constexpr, S: gl.constexpr):
    o_key = gl.arange(0, b_s.shape[1], layout=gl.SliceLayout(0, S))
    visible = o_key[None, :] <= last_key[:, None]
    if WINDOW:
        visible = visible & (o_key[None, :] > oldest_key[:, None])
    return gl.where(visible, b_s, -float("inf"))


@gluon.jit
def step(
    acc, b_p, b_m, b_l, b_shrink, slot, phase, last_key, oldest_key, q, k_smem, v_smem, full, empty, scale_log2,
    PART: gl.constexpr, PARTS: gl.constexpr, MASKED: gl.constexpr, WINDOW: gl.constexpr,
    PINGPONG: gl.constexpr, LAZY: gl.constexpr, SKIP: gl.constexpr, EMULATE: gl.constexpr, TREE: gl.constexpr, PIN: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    SLOTS: gl.constexpr = k_smem.shape[0]
    ROWS: gl.constexpr = q.shape[0]
    KEYS: gl.constexpr = k_smem.shape[1]
    S: gl.constexpr = product_layout(k_smem.shape[1])
    ACC: gl.constexpr = product_layout(v_smem.shape[2])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    mbarrier.wait(full.index(slot), phase)
    b_left = unpack(b_p, k_smem.dtype, LEFT) if PACK else gl.convert_layout(b_p.to(k_smem.dtype), LEFT)
    b_acc = shrink_rows(acc, b_shrink, SKIP)
    if PINGPONG:
        named_sync(9 + PART, 256)
    s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), gl.zeros([ROWS, KEYS], gl.float32, S), use_acc=False, is_async=True)
    acc = warpgroup_mma(b_left, v_smem.index(slot), b_acc, is_async=True)
    if PINGPONG:
        named_arrive(9 + (PART + 1) % PARTS, 256)
    b_s = warpgroup_mma_wait(1, deps=(s,))
    if MASKED:
        b_s = hide(b_s, last_key, oldest_key, WINDOW, S)
    b_p, b_m, b_shrink = centre(b_s, b_m, scale_log2, EMULATE if not MASKED else 0, SKIP, TREE)
    b_l = add_up(b_l, b_p, b_shrink, LAZY)
    if PIN:
        b_l = pin(b_l)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if PACK:
        b_p = pack(b_p, k_smem.dtype)
    mbarrier.arrive(empty.index(slot), count=1)
    slot, phase = advance(slot, phase, SLOTS)
    return acc, b_p, b_m, b_l, b_shrink, slot, phase


@gluon.jit
def bounds(runs, i_run, ROW0: gl.constexpr, ROWS: gl.constexpr, WINDOW: gl.constexpr, S: gl.constexpr):
    start, length, shift, low, high, window = run_at(runs, i_run)
    o_row = ROW0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    last_key = gl.where((o_row >= low) & (o_row < high), gl.minimum(o_row + shift, length - 1), -1)
    return length, last_key, o_row + shift - window


@gluon.jit
def tile_of(x, strides, i_b, i_h, row0, ROWS: gl.constexpr, BLOCK_E: gl.constexpr, L: gl.constexpr):
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    o_e = gl.arange(0, BLOCK_E, layout=gl.SliceLayout(0, L))
    p_x = x + i_b.to(gl.int64) * strides[0] + i_h.to(gl.int64) * strides[2] + row0.to(gl.int64) * strides[1]
    return p_x + o_row[:, None] * strides[1] + o_e[None, :]


@gluon.jit
def inside_of(rows, E: gl.constexpr, ROWS: gl.constexpr, BLOCK_E: gl.constexpr, L: gl.constexpr):
    inside = (gl.arange(0, ROWS, layout=gl.SliceLayout(1, L)) < rows)[:, None]
    if E < BLOCK_E:
        return inside & (gl.arange(0, BLOCK_E, layout=gl.SliceLayout(0, L)) < E)[None, :]
    else:
        return inside


@gluon.jit
def rows_of(lse, strides, i_b, i_h, row0, ROWS: gl.constexpr, L: gl.constexpr):
    return lse + i_b.to(gl.int64) * strides[0] + i_h.to(gl.int64) * strides[1] + row0 + gl.arange(0, ROWS, layout=L)


@gluon.jit
def attend_rows(
    PART: gl.constexpr,
    q_smem, k_smem, v_smem, q_full, q_empty, full, empty, out, lse, before, tiles, runs, error,
    scale, LENGTH, TILES, SIDE, TOTAL, out_strides, lse_strides, before_strides,
    HEADS: gl.constexpr, E: gl.constexpr, MERGE: gl.constexpr, WINDOW: gl.constexpr,
    PINGPONG: gl.constexpr, LAZY: gl.constexpr, SKIP: gl.constexpr, EMULATE: gl.constexpr, TREE: gl.constexpr, QREG: gl.constexpr, PIN: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup"""
    PARTS: gl.constexpr = q_smem.shape[0]
    ROWS: gl.constexpr = q_smem.shape[1]
    SLOTS: gl.constexpr = k_smem.shape[0]
    KEYS: gl.constexpr = k_smem.shape[1]
    BLOCK_E: gl.constexpr = v_smem.shape[2]
    S: gl.constexpr = product_layout(KEYS)
    ACC: gl.constexpr = product_layout(BLOCK_E)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    LEFT_Q: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S, k_width=2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    dtype: gl.constexpr = k_smem.dtype
    scale_log2 = scale * LOG2E
    slot = 0
    phase = 0
    q_phase = 0
    if PINGPONG:
        if PART == PARTS - 1:
            named_arrive(9, 256)
    o_row = gl.arange(0, ROWS, layout=S_ROW)
    for i_round in range(rounds_of(TOTAL)):
        i_tile, i_b, i_h = place(i_round, TILES, SIDE, TOTAL, HEADS)
        tile0, first, middle, end = tile_at(tiles, i_tile)
        row0 = tile0 + PART * ROWS
        b_m = gl.full([ROWS], LOWEST, gl.float32, S_ROW)
        if LAZY:
            b_l = gl.sum(fold(gl.zeros([ROWS, KEYS], gl.float32, S)), 1)
        else:
            b_l = gl.zeros([ROWS], gl.float32, S_ROW)
        if MERGE:
            b_acc = gl.load(
                tile_of(before, before_strides, i_b, i_h, row0, ROWS, BLOCK_E, ACC),
                mask=inside_of(LENGTH - row0, E, ROWS, BLOCK_E, ACC), other=0.0,
            )
            b_m = gl.load(rows_of(lse, lse_strides, i_b, i_h, row0, ROWS, S_ROW), mask=o_row < LENGTH - row0, other=-float("inf")) * LOG2E
            b_one = gl.where(b_m == -float("inf"), 0.0, 1.0)
            b_m = gl.maximum(b_m, LOWEST)
            if LAZY:  # an eighth in each of the eight partial sums
                b_l = b_l + gl.convert_layout(b_one * 0.125, gl.SliceLayout(1, b_l.type.layout))[:, None]
            else:
                b_l = b_one
        else:
            b_acc = gl.zeros([ROWS, BLOCK_E], gl.float32, ACC)
        if first < end:
            run0 = gl.where(middle < end, middle, first)
            length, last_key, oldest_key = bounds(runs, run0, PART * ROWS, ROWS, WINDOW, S)
            mbarrier.wait(q_full.index(PART), q_phase)
            if QREG:
                q = q_smem.index(PART).load(LEFT_Q)
                mbarrier.arrive(q_empty.index(PART), count=1)
            else:
                q = q_smem.index(PART)
            q_phase ^= 1
            mbarrier.wait(full.index(slot), phase)
            if PINGPONG:
                named_sync(9 + PART, 256)
            s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), gl.zeros([ROWS, KEYS], gl.float32, S), use_acc=False, is_async=True)
            if PINGPONG:
                named_arrive(9 + (PART + 1) % PARTS, 256)
            b_s = warpgroup_mma_wait(0, deps=(s,))
            b_s = hide(b_s, last_key, oldest_key, WINDOW, S)
            b_p, b_m, b_shrink = centre(b_s, b_m, scale_log2, 0, SKIP, TREE)
            b_l = add_up(b_l, b_p, b_shrink, LAZY)
            if PACK:
                b_p = pack(b_p, dtype)
            acc = b_acc
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = advance(slot, phase, SLOTS)
            for i_run in range(middle, end):
                length, last_key, oldest_key = bounds(runs, i_run, PART * ROWS, ROWS, WINDOW, S)
                for j in range(gl.where(i_run == run0, KEYS, 0), length, KEYS):
                    acc, b_p, b_m, b_l, b_shrink, slot, phase = step(
                        acc, b_p, b_m, b_l, b_shrink, slot, phase, last_key - j, oldest_key - j, q, k_smem, v_smem, full, empty,
                        scale_log2, PART, PARTS, True, WINDOW, PINGPONG, LAZY, SKIP, EMULATE, TREE, PIN, PACK,
                    )  # fmt: skip
            for i_run in range(first, middle):
                for _ in range(gl.where(i_run == run0, KEYS, 0), gl.load(runs + 6 * i_run + 1), KEYS):
                    acc, b_p, b_m, b_l, b_shrink, slot, phase = step(
                        acc, b_p, b_m, b_l, b_shrink, slot, phase, last_key, oldest_key, q, k_smem, v_smem, full, empty,
                        scale_log2, PART, PARTS, False, WINDOW, PINGPONG, LAZY, SKIP, EMULATE, TREE, PIN, PACK,
                    )  # fmt: skip
            if not QREG:
                mbarrier.arrive(q_empty.index(PART), count=1)
            mbarrier.wait(full.index(slot), phase)
            b_acc = shrink_rows(acc, b_shrink, SKIP)
            acc = warpgroup_mma(unpack(b_p, dtype, LEFT) if PACK else gl.convert_layout(b_p.to(dtype), LEFT), v_smem.index(slot), b_acc, is_async=True)
            if LAZY:
                b_sum = gl.convert_layout(gl.sum(b_l, 1), S_ROW)
            else:
                b_sum = b_l
            seen = b_sum > 0.0
            gl.store(rows_of(lse, lse_strides, i_b, i_h, row0, ROWS, S_ROW), gl.where(seen, (b_m + gl.log2(b_sum)) * LN2, -float("inf")), mask=o_row < LENGTH - row0)
            b_inverse = gl.convert_layout(gl.where(seen, 1.0 / b_sum, 0.0), gl.SliceLayout(1, ACC))
            b_acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = advance(slot, phase, SLOTS)
            b_acc = b_acc * b_inverse[:, None]
        elif not MERGE:
            gl.store(rows_of(lse, lse_strides, i_b, i_h, row0, ROWS, S_ROW), gl.full([ROWS], -float("inf"), gl.float32, S_ROW), mask=o_row < LENGTH - row0)
        gl.store(
            tile_of(out, out_strides, i_b, i_h, row0, ROWS, BLOCK_E, ACC), b_acc.to(out.dtype.element_ty),
            mask=inside_of(LENGTH - row0, E, ROWS, BLOCK_E, ACC),
        )
    if PINGPONG:
        if PART == 0:
            named_sync(9, 256)


@gluon.jit(do_not_specialize=["LENGTH", "TILES", "SIDE", "TOTAL", "EPOCH", "SLOT"])
def forward_kernel(
    q, k, v, out, lse, before, tiles, runs, flags, error, scale, LENGTH, TILES, SIDE, TOTAL, EPOCH, SLOT, PATIENCE,
    out_strides, lse_strides, before_strides,
    HEADS: gl.constexpr, GROUP: gl.constexpr, E: gl.constexpr, SLOTS: gl.constexpr, PARTS: gl.constexpr,
    MERGE: gl.constexpr, WINDOW: gl.constexpr, REGISTERS: gl.constexpr,
    PINGPONG: gl.constexpr, LAZY: gl.constexpr, SKIP: gl.constexpr, EMULATE: gl.constexpr, TREE: gl.constexpr, QREG: gl.constexpr, PIN: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k.dtype
    ROWS: gl.constexpr = q.block_type.shape[2]
    KEYS: gl.constexpr = k.block_type.shape[2]
    BLOCK_D: gl.constexpr = k.block_type.shape[3]
    BLOCK_E: gl.constexpr = v.block_type.shape[3]
    q_smem = gl.allocate_shared_memory(dtype, [PARTS, ROWS, BLOCK_D], gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], dtype))
    k_smem = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, BLOCK_D], gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_D], dtype))
    v_smem = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, BLOCK_E], gl.NVMMASharedLayout.get_default_for([KEYS, BLOCK_E], dtype))
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [PARTS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [PARTS, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    for i in gl.static_range(PARTS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PARTS)
    fence_async_shared()
    if PARTS == 2:
        gl.warp_specialize([(attend_rows, (0, q_smem, k_smem, v_smem, q_full, q_empty, full, empty, out, lse, before, tiles, runs, error,
        scale, LENGTH, TILES, SIDE, TOTAL, out_strides, lse_strides, before_strides,
        HEADS, E, MERGE, WINDOW, PINGPONG, LAZY, SKIP, EMULATE, TREE, QREG, PIN, PACK)), (attend_rows, (1, q_smem, k_smem, v_smem, q_full, q_empty, full, empty, out, lse, before, tiles, runs, error,
        scale, LENGTH, TILES, SIDE, TOTAL, out_strides, lse_strides, before_strides,
        HEADS, E, MERGE, WINDOW, PINGPONG, LAZY, SKIP, EMULATE, TREE, QREG, PIN, PACK)), (load_tiles, (q, k, v, q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
        tiles, runs, flags, error, EPOCH, SLOT, PATIENCE, TILES, SIDE, TOTAL, HEADS, GROUP))], [4, 1], [REGISTERS, 24])
    else:
        gl.warp_specialize([(attend_rows, (0, q_smem, k_smem, v_smem, q_full, q_empty, full, empty, out, lse, before, tiles, runs, error,
        scale, LENGTH, TILES, SIDE, TOTAL, out_strides, lse_strides, before_strides,
        HEADS, E, MERGE, WINDOW, PINGPONG, LAZY, SKIP, EMULATE, TREE, QREG, PIN, PACK)), (attend_rows, (1, q_smem, k_smem, v_smem, q_full, q_empty, full, empty, out, lse, before, tiles, runs, error,
        scale, LENGTH, TILES, SIDE, TOTAL, out_strides, lse_strides, before_strides,
        HEADS, E, MERGE, WINDOW, PINGPONG, LAZY, SKIP, EMULATE, TREE, QREG, PIN, PACK)), (attend_rows, (2, q_smem, k_smem, v_smem, q_full, q_empty, full, empty, out, lse, before, tiles, runs, error,
        scale, LENGTH, TILES, SIDE, TOTAL, out_strides, lse_strides, before_strides,
        HEADS, E, MERGE, WINDOW, PINGPONG, LAZY, SKIP, EMULATE, TREE, QREG, PIN, PACK)), (load_tiles, (q, k, v, q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
        tiles, runs, flags, error, EPOCH, SLOT, PATIENCE, TILES, SIDE, TOTAL, HEADS, GROUP))], [4, 4, 1], [REGISTERS, REGISTERS, 32])
