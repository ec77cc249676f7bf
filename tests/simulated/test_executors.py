"""Every executor against fp64 for every layout, ring size, head count, mask, length and dtype, all ranks in one
process."""

import itertools

import pytest
import torch

from ringattn.cost import Workload, predict
from ringattn.executors import gather, pull, ring
from ringattn.executors.call import Buffers, Call, Schedule
from ringattn.kernels.interface import Kernel
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.registry import KERNELS
from ringattn.launch.oracle import Case, Inputs, Result, attend_on_one_rank, exact, make_inputs
from ringattn.layout import LAYOUTS
from ringattn.plan import Plan, make_plan
from ringattn.transport.simulated import Network, simulate
from tests.tolerance import assert_close

HEADS = [(4, 4), (4, 1), (8, 2)]
EXECUTORS = {
    "ring": (ring, Schedule()),
    "ring, own keys at once": (ring, Schedule(halves=False)),
    "gather": (gather, Schedule()),
    "gather by head groups": (gather, Schedule(halves=False, head_groups=3)),
    "pull": (pull, Schedule()),
    "pull, own keys at once": (pull, Schedule(halves=False)),
}


def across_ranks(
    executor: str, plan: Plan, kernel: Kernel, case: Case, inputs: Inputs, network: Network | None = None
) -> Result:
    module, schedule = EXECUTORS[executor]

    def work(rank, transport):
        symmetric = transport if module is pull else None
        call = Call(plan, rank, kernel, case.head_dim**-0.5, transport, Buffers(), symmetric, schedule)
        q, k, v, dout = (plan.layout.shard(x, rank, 1) for x in inputs)
        out, lse = module.forward(call, q, k, v)
        grads = module.backward(call, dout, q, k, v, out, lse, None)
        return Result(out, *(grad.to(q.dtype) for grad in grads))

    parts = simulate(plan.ranks, work, network)
    return Result(*(plan.layout.unshard(shards, 1) for shards in zip(*parts, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_equal_one_rank(layout, ranks, dtype):
    """The ring on every case, the other executors in turn beside it."""
    shapes = itertools.product(HEADS, (True, False), ((100, 1), (67, 3), (96, 1)))
    for seed, ((q_heads, kv_heads), causal, (seq_len, batch)) in enumerate(shapes):
        case = Case(seq_len, batch, q_heads, kv_heads, causal=causal, dtype=dtype)
        inputs = make_inputs(case, seed)
        plan = make_plan(layout, seq_len, ranks, causal=causal)
        right, baseline = exact(case, inputs), attend_on_one_rank(KERNELS["aten"], case, inputs)
        for executor in ("ring", list(EXECUTORS)[1 + seed % (len(EXECUTORS) - 1)]):
            got = across_ranks(executor, plan, KERNELS["aten"], case, inputs)
            assert_close(got, right, baseline)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("kernel", ["aten", "reference"])
@pytest.mark.parametrize("seq_len", [0, 1, 3, 5, 100])
def test_short_and_odd_lengths(kernel, seq_len, executor):
    """Fewer tokens than ranks leave ranks empty; 100 over 3 does not divide."""
    for layout, ranks, causal in itertools.product(LAYOUTS, (3, 8) if seq_len < 8 else (3,), (True, False)):
        case = Case(seq_len, 2, 2, 1, 8, causal)
        inputs = make_inputs(case, seq_len)
        plan = make_plan(layout, seq_len, ranks, causal=causal)
        got = across_ranks(executor, plan, KERNELS[kernel], case, inputs)
        assert_close(got, exact(case, inputs), attend_on_one_rank(KERNELS[kernel], case, inputs))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_order_of_arrival_gives_the_same_bits(layout, executor):
    """What a rank reads too early is NaN, and what is overwritten too early arrives wrong: see `simulated.py`."""
    case = Case(90, 2, 4, 2, 8, dtype=torch.float32)
    plan = make_plan(layout, 90, 4, causal=True)
    inputs = make_inputs(case, 0)
    first = across_ranks(executor, plan, KERNELS["aten"], case, inputs)
    for seed in range(1, 6):
        again = across_ranks(executor, plan, KERNELS["aten"], case, inputs, Network(seed, spread=100, pause=1e-3))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_many_calls_share_memory(executor):
    """As in a model: the forwards of many layers, then their backwards in reverse, in shapes and with numbers that
    change. Memory grows, moves, and is used again while others still copy from it."""
    module, schedule = EXECUTORS[executor]
    cases = [
        Case(seq_len, batch, 4, 2, 8)
        for seq_len, batch in ((24, 1), (24, 1), (90, 2), (90, 2), (24, 1), (24, 1), (7, 1))
    ]
    inputs = [make_inputs(case, number) for number, case in enumerate(cases)]
    plans = [make_plan("zigzag", case.seq_len, 3, causal=True) for case in cases]
    right = [exact(case, x) for case, x in zip(cases, inputs, strict=True)]

    def work(rank, transport):
        buffers, calls, held, results = Buffers(), {}, [], []
        for case, plan, x in zip(cases, plans, inputs, strict=True):
            symmetric = transport if module is pull else None
            new = Call(plan, rank, KERNELS["reference"], 8**-0.5, transport, buffers, symmetric, schedule)
            call = calls.setdefault(case, new)
            q, k, v, dout = (plan.layout.shard(part, rank, 1) for part in x)
            out, lse = module.forward(call, q, k, v)
            held.append((call, dout, q, k, v, out, lse))
        for call, dout, q, k, v, out, lse in reversed(held):
            results.append((out, *module.backward(call, dout, q, k, v, out, lse, None)))
        return results[::-1]

    for seed in range(8):
        everything = zip(*simulate(3, work, Network(seed, spread=100, pause=1e-3)), strict=True)
        for plan, expected, parts in zip(plans, right, everything, strict=True):
            got = [plan.layout.unshard(shards, 1) for shards in zip(*parts, strict=True)]
            for x, y in zip(got, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


class Rememberer(ReferenceKernel):
    """Remembers what gradients it has made."""

    def __init__(self):
        self.made = []

    def backward(self, dout, q, k, v, *arguments, **options):
        dq, dk, dv = super().backward(dout, q, k, v, *arguments, **options)
        dk, dv = dk.contiguous(), dv.contiguous()  # as they are sent
        self.made += [dk, dv]
        return dq, dk, dv


@pytest.mark.parametrize("executor", EXECUTORS)
def test_when_a_call_returns_its_tensors_have_been_sent(executor):
    """Their memory may be used for something else at once, while others are still busy with the call."""
    case = Case(48, 2, 4, 2, 8)
    plan = make_plan("zigzag", 48, 3, causal=True)
    inputs = make_inputs(case, 0)
    module, schedule = EXECUTORS[executor]

    def work(rank, transport):
        kernel = Rememberer()
        symmetric = transport if module is pull else None
        call = Call(plan, rank, kernel, 8**-0.5, transport, Buffers(), symmetric, schedule)
        q, k, v, dout = (plan.layout.shard(x, rank, 1) for x in inputs)
        mine = k.clone(), v.clone()
        out, lse = module.forward(call, q, *mine)
        for x in mine:
            x.fill_(torch.nan)
        mine = k.clone(), v.clone()
        grads = [x.clone() for x in module.backward(call, dout, q, *mine, out, lse, None)]
        for x in (*mine, *kernel.made):
            x.fill_(torch.nan)
        return Result(out, *grads)

    for seed in range(20):
        parts = simulate(3, work, Network(seed, spread=100, pause=(1e-3, 1e-5)[seed % 2]))
        for shards, right in zip(zip(*parts, strict=True), exact(case, inputs), strict=True):
            torch.testing.assert_close(plan.layout.unshard(shards, 1), right, rtol=1e-10, atol=1e-10)


class Yielding(ReferenceKernel):
    """Remembers how many multiprocessors it was told to leave to others."""

    yields = True

    def __init__(self):
        self.margins = []

    def forward(self, *arguments, margin=0, **options):
        self.margins.append(margin)
        return super().forward(*arguments, **options)


def test_the_ring_leaves_room_for_messages_while_there_are_any():
    plan = make_plan("zigzag", 48, 3, causal=True)

    def work(rank, transport):
        kernel = Yielding()
        transport.processors = 4
        call = Call(plan, rank, kernel, 1.0, transport, Buffers())
        q, k, v = torch.randn(3, 1, plan.layout.lengths[rank], 2, 8)
        ring.forward(call, q, k, v)
        return kernel.margins

    assert simulate(3, work) == [[4, 4, 0]] * 3


class Witness(ReferenceKernel):
    """Fails when a partial result or gradient comes back in less than fp32."""

    def forward(self, q, k, v, segments, *, running=None, **options):
        assert running is None or running[0].dtype == running[1].dtype == torch.float32
        return super().forward(q, k, v, segments, running=running, **options)

    def backward(self, dout, q, k, v, *arguments, dq=None, **options):
        assert dq is None or dq.dtype == torch.float32
        grads = super().backward(dout, q, k, v, *arguments, dq=dq, **options)
        assert all(grad.dtype == torch.float32 for grad in grads)
        return grads


@pytest.mark.parametrize("executor", EXECUTORS)
def test_partial_results_stay_in_fp32_from_hop_to_hop(executor):
    case = Case(64, dtype=torch.bfloat16)
    plan = make_plan("zigzag", 64, 4, causal=True)
    across_ranks(executor, plan, Witness(), case, make_inputs(case, 0))


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("executor", [name for name in EXECUTORS if "head groups" not in name])
def test_memory_keeps_to_what_is_foretold(executor, ranks):
    """What is kept for others' keys and gradients. The ring's: five shards' worth of keys and values, three of them
    fp32 gradients, whatever the ring size."""
    module, schedule = EXECUTORS[executor]
    tokens, heads, head_dim = 64, 2, 8
    plan = make_plan("zigzag", tokens * ranks, ranks, causal=True)

    def work(rank, transport):
        buffers = Buffers()
        symmetric = transport if module is pull else None
        call = Call(plan, rank, KERNELS["reference"], 1.0, transport, buffers, symmetric, schedule)
        q, k, v, dout = torch.randn(4, 1, tokens, heads, head_dim)
        out, lse = module.forward(call, q, k, v)
        module.backward(call, dout, q, k, v, out, lse, None)
        return buffers.nbytes + sum(region.numel() for region in transport.regions)

    shape = 1, heads, heads, head_dim, head_dim, 4
    load = Workload(plan, "reference", *shape, same_node=True, waits=False, delivers=False, memory=1)
    name = module.__name__.split(".")[-1]
    way = name, schedule._replace(halves=True)
    foretold = next(x.memory for x in predict(load) if (x.executor, x.schedule._replace(replay=False)) == way)
    held = simulate(ranks, work)
    assert max(held) <= foretold
    if module is ring:
        assert foretold == 5 * 2 * tokens * heads * head_dim * 4
