"""What a program of the Hopper backward walks: the rows that see its keys, block by block, for some heads.

Every warp that walks does so by itself, from the same tables, and all of them come to the same steps in the same order.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_tile import read_anew, run_at

__all__ = ["BLOCK", "ROWS", "block_at", "masks_at", "place", "steps_of", "visit"]

ROWS = gl.constexpr(64)  # of a step
BLOCK = gl.constexpr(128)  # rows of a block: two steps, or one where the run ends in its first half


@gluon.jit
def place(order, GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr):
    """Batch, key/value head, first query head, first key, first run and end of the runs of this program."""
    SHARES: gl.constexpr = GROUP // SHARE
    p_piece = order + 4 * read_anew("%ctaid.x")
    i_share = gl.load(p_piece)
    i_bg = i_share // SHARES
    i_g = i_bg % GROUPS
    head0 = i_g * GROUP + i_share % SHARES * SHARE
    return i_bg // GROUPS, i_g, head0, gl.load(p_piece + 1), gl.load(p_piece + 2), gl.load(p_piece + 3)


@gluon.jit
def steps_of(order, runs, GROUPS: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr):
    """How many steps this program walks."""
    _, _, _, _, first, end = place(order, GROUPS, GROUP, SHARE)
    steps = 0
    for i_run in range(first, end):
        _, length, _, _, _, _, _, _ = run_at(runs, i_run)
        steps += gl.cdiv(length, ROWS)
    return steps * SHARE


@gluon.jit
def visit(i, blocks, SHARE: gl.constexpr, ORDERED: gl.constexpr):
    """Which block of a run and which head come i-th: head after head, or, where tiles wait for one another, all heads
    of a block, so that a short tile need not wait for long ones to come to its next head."""
    if ORDERED:
        return i // SHARE, i % SHARE
    else:
        return i % blocks, i // blocks


@gluon.jit
def block_at(n, length, head, tail):
    """Where the n-th block of a run begins, in the order of the walk: those without a mask, then the others, last rows
    first. So programs that run side by side come to the same rows at about the same time, earlier tiles first."""
    whole = (tail - head) // BLOCK
    masked = (gl.cdiv(length, BLOCK) - 1 - n) * BLOCK
    return gl.where(n < whole, tail - (n + 1) * BLOCK, gl.where(masked < head, masked, masked - head + tail))


@gluon.jit
def masks_at(j, runs, i_run):
    """Which halves of the tile's keys need a mask in the step that begins at j of a run: 1 for the first, 2 for the
    second, 3 for both. The run is read here, where it is needed, so that nobody keeps it in registers."""
    _, length, _, _, shift, low, high, window = run_at(runs, i_run)
    first, second = masked(0, j, length, shift, low, high, window), masked(1, j, length, shift, low, high, window)
    return gl.where(first, 1, 0) + gl.where(second, 2, 0)


@gluon.jit
def masked(HALF, j, length, shift, low, high, window):
    """Whether any key of one half of the tile does not see all rows of the step that begins at j."""
    key = HALF * 64
    nearest = j + shift - (key + 63)  # from the half's last key to the step's first row
    partial = (j + ROWS > length) | (key < low) | (key + 64 > high)
    return partial | (nearest < 0) | (nearest + 63 + 63 >= window)
