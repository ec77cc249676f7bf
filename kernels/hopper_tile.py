"""What the Hopper kernels of both directions share: names that moved between releases of Triton, named barriers,
places in a ring of buffers, a walk through tiles that stays on its multiprocessor.

Gluon (`triton.experimental.gluon`) says itself which warps do what and how tiles lie in memory and registers. What it
has no words for, a few PTX instructions, stands here as inline assembly.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportCallIssue=false

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from . import triton_tile

__all__ = [
    "CROWDED",
    "LN2",
    "LOG2E",
    "LOWEST",
    "advance",
    "await_flag",
    "fetch",
    "flag_of",
    "locate",
    "meet",
    "named_arrive",
    "named_sync",
    "product_layout",
    "read_anew",
    "rounds_of",
    "run_at",
]

# The assembler that comes with Triton 3.9 has fewer registers left: it keeps what is alive all through a loop.
CROWDED = gl.constexpr([int(x) for x in triton.__version__.split(".")[:2]] >= [3, 9])
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3.4028234663852886e38)  # the maximum over nothing; -inf less -inf would be NaN

fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name until Triton 3.7
meet = getattr(gl, "barrier", None) or gl.thread_barrier  # of a warpgroup; its name until Triton 3.6
run_at = gluon.jit(triton_tile.run_at.fn)


@gluon.constexpr_function
def product_layout(columns):
    """How a warpgroup holds 64 rows of a product: 16 rows in each warp, one row in four lanes, columns 8k + 2i and
    8k + 2i + 1 in the i-th of them."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def advance(slot, phase, SLOTS: gl.constexpr):
    """The next slot of a ring of buffers, and the phase of its barriers, which changes with every round."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def read_anew(REGISTER: gl.constexpr):
    """A special register. Of `gl.program_id` or a range the compiler would keep what was made of it across a walk."""
    return gl.inline_asm_elementwise(read_asm(REGISTER), "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def read_asm(register):
    return f"mov.u32 $0, {getattr(register, 'value', register)};"


@gluon.jit
def named_sync(BARRIER: gl.constexpr, THREADS: gl.constexpr):
    """Waits at a barrier until `THREADS` threads have come to it, this warpgroup's included. Triton itself uses the
    barriers 0 to 8."""
    gl.inline_asm_elementwise(barrier_asm("sync", BARRIER, THREADS), "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def named_arrive(BARRIER: gl.constexpr, THREADS: gl.constexpr):
    """Counts this warpgroup in at a barrier and goes on."""
    gl.inline_asm_elementwise(barrier_asm("arrive", BARRIER, THREADS), "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def barrier_asm(operation, barrier, threads):
    operation, barrier, threads = (getattr(x, "value", x) for x in (operation, barrier, threads))
    return f"bar.{operation} {barrier}, {threads}; mov.b32 $0, 0;"


@gluon.jit
def flag_of(i_g, key, SHARED, SLOT, GROUPS: gl.constexpr):
    """The flag of a key that is on its way, of one of GROUPS key/value heads."""
    return ((key // SLOT - 1) * GROUPS + i_g) // SHARED


@gluon.jit
def await_flag(flag, error, EPOCH, PATIENCE, i_flag):
    """Returns once *flag has reached EPOCH, which may wrap around; what was written before may then be read, by TMA
    too.

    Gives up when others did or after PATIENCE nanoseconds: *error becomes 1 + i_flag, and whoever uses what was read
    must look at it afterwards. For one warp, whose lanes all do the same."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred done; .reg .b32 value; .reg .b64 now, end;
        mov.u64 end, %globaltimer;
        add.u64 end, end, $4;
        POLL:
        ld.acquire.sys.global.b32 value, [$1];
        sub.s32 value, value, $3;
        setp.ge.s32 done, value, 0;
        @done bra THERE;
        ld.relaxed.gpu.global.b32 value, [$2];
        setp.ne.s32 done, value, 0;
        @done bra THERE;
        mov.u64 now, %globaltimer;
        setp.lt.u64 done, now, end;
        @done bra POLL;
        st.relaxed.gpu.global.b32 [$2], $5;
        THERE:
        fence.proxy.async;
        mov.b32 $0, 0;
        }""",
        "=r,l,l,r,l,r", [flag.to(gl.uint64), error.to(gl.uint64), EPOCH, PATIENCE, i_flag + 1],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def rounds_of(pieces):
    """How many pieces of work this program has."""
    return gl.load(pieces + 4 * gl.program_id(0))


@gluon.jit
def locate(i_round, pieces):
    """First head (of all sequences' heads), first row, first run and end of runs of a piece of work (`dealing.py`)."""
    p_piece = pieces + 4 * ((i_round + 1) * gl.num_programs(0) + gl.program_id(0))
    return gl.load(p_piece), gl.load(p_piece + 1), gl.load(p_piece + 2), gl.load(p_piece + 3)
