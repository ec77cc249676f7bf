"""What is masked of a step in the Hopper backward, 64 rows and one half of the tile's keys, where anything is.

Row t of a run is seen by key u iff t + shift - window < u <= t + shift: a stretch of rows for every key. Of each key, a
lane has the rows 8k + 2i and 8k + 2i + 1, i its number among four. So it shifts ones to where the stretch begins and
where it ends, and has the rows of a key as bits 8k and 8k + 1 of two words:

    (ones << begin - 2i) & ~(ones << end - 2i)

That is done in assembly, because there every k is a constant, and shifts by more than a word give zero.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOptionalMemberAccess=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_scores import tied

__all__ = ["hidden", "hidden_pairs"]


@gluon.jit
def hidden(b_s, s_place, s_walk, HALF: gl.constexpr):
    """S, -inf where it is masked."""
    first = word(s_place, HALF)
    if first >= 0:
        EACH: gl.constexpr = b_s.shape[0] * b_s.shape[1] // 128  # numbers in a thread, of two keys in turn
        begin, end = stretch(b_s, first, s_walk, HALF)
        b_s = gl.inline_asm_elementwise(
            hidden_asm(EACH), tied("f", EACH) + 2 * EACH * ",r", [b_s, begin, end],
            dtype=gl.float32, is_pure=True, pack=EACH,
        )  # fmt: skip
    return b_s


@gluon.jit
def hidden_pairs(b_pair, b_kept, s_place, s_walk, HALF: gl.constexpr):
    """Pairs of P in two forms, int32 [64, ROWS / 2], zero where they are masked."""
    first = word(s_place, HALF)
    if first >= 0:
        EACH: gl.constexpr = b_pair.shape[0] * b_pair.shape[1] // 128  # pairs in a thread, of two keys in turn
        begin, end = stretch(b_pair, first, s_walk, HALF)
        b_pair, b_kept = gl.inline_asm_elementwise(
            hidden_pairs_asm(EACH), tied("r", 2 * EACH) + 2 * EACH * ",r", [b_pair, b_kept, begin, end],
            dtype=(gl.int32, gl.int32), is_pure=True, pack=EACH,
        )  # fmt: skip
    return b_pair, b_kept


@gluon.jit
def stretch(b_x, first, s_walk, HALF: gl.constexpr):
    """Where the rows that see each key begin and end, counted from `first` of the run: once for every number of b_x."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, b_x.type.layout)
    length, shift = word(s_walk, 1), word(s_walk, 4)
    low, high, window = word(s_walk, 5), word(s_walk, 6), word(s_walk, 7)
    key = HALF * 64 + keys_anew(LAYOUT)
    begin = key - shift - first
    end = gl.where((key >= low) & (key < high), gl.minimum(begin + window, length - first), 0)
    _, begin = gl.broadcast(b_x, begin[:, None])
    _, end = gl.broadcast(b_x, end[:, None])
    return begin, end


@gluon.jit
def keys_anew(LAYOUT: gl.constexpr):
    """0 .. 64 in the layout of a product's rows, two to a thread. What the lane contributes is read here: `gl.arange`
    would keep it in a register across steps that have no mask."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 lane; mov.u32 lane, %laneid; shr.u32 lane, lane, 2; or.b32 $0, $2, lane; or.b32 $1, $3, lane; }",
        "=&r,=r,r,r", [gl.arange(0, 64, LAYOUT) & 56], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def word(s_x, COLUMN: gl.constexpr):
    """A number of a line in shared memory, the same for all threads of a warpgroup."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
    return gl.sum(gl.sum(s_x.slice(0, 1).slice(COLUMN, 1, dim=1).load(layout), 1), 0)


@gluon.constexpr_function
def bits_asm(begin, end):
    """bits{key}{word}: which rows see each of the thread's two keys, from its own first row on."""
    lines = [
        ".reg .b32 lane, ones, from, to, bits00, bits01, bits10, bits11;",
        "mov.u32 lane, %laneid; and.b32 lane, lane, 3; shl.b32 lane, lane, 1; mov.b32 ones, -1;",
    ]
    for key in (0, 1):
        for word in (0, 1):
            for name, bound in (("from", begin[key]), ("to", end[key])):
                lines.append(f"sub.s32 {name}, {bound}, lane; add.s32 {name}, {name}, {-32 * word};")
                lines.append(f"max.s32 {name}, {name}, 0; shl.b32 {name}, ones, {name};")
            lines.append(f"not.b32 to, to; and.b32 bits{key}{word}, from, to;")
    return lines


@gluon.constexpr_function
def hidden_asm(n):
    """Operands: n results, n scores, n begins, n ends; of four neighbours, two belong to each of the thread's keys."""
    lines = [".reg .pred p; .reg .b32 bit;", *bits_asm(*((f"${i * n}", f"${i * n + 2}") for i in (2, 3)))]
    for i in range(n):
        key, row = i // 2 % 2, 8 * (i // 4) + i % 2
        lines.append(f"and.b32 bit, bits{key}{row // 32}, {1 << row % 32}; setp.eq.s32 p, bit, 0;")
        lines.append(f"@p mov.b32 ${i}, 0fFF800000;")
    return "{ " + " ".join(lines) + " }"


@gluon.constexpr_function
def hidden_pairs_asm(n):
    """Operands: 2 n results, 2 n pairs, n begins, n ends; keys take turns. Bits become the signs of bytes, and those
    are spread over the two halves of a word."""
    lines = [
        ".reg .b32 mask, even00, even01, even10, even11, odd00, odd01, odd10, odd11;",
        *bits_asm(*((f"${i * n}", f"${i * n + 1}") for i in (4, 5))),
        *(f"shl.b32 even{x}, bits{x}, 7; shl.b32 odd{x}, bits{x}, 6;" for x in ("00", "01", "10", "11")),
    ]
    for i in range(n):
        of, byte = f"{i % 2}{i // 8}", i // 2 % 4
        lines.append(f"prmt.b32 mask, even{of}, odd{of}, {0xCC88 + 0x1111 * byte};")
        lines.append(f"and.b32 ${i}, ${2 * n + i}, mask; and.b32 ${n + i}, ${3 * n + i}, mask;")
    return "{ " + " ".join(lines) + " }"
