"""pull in one launch that looks itself which keys have come: each is read after its flag, in any order of arrival; and
gradients are stored where they belong."""

import random
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from ringattn.cost import Workload, predict
from ringattn.executors import pull
from ringattn.executors.call import Buffers, Call, Schedule
from ringattn.kernels.reference import ReferenceKernel
from ringattn.launch.oracle import Case, Result, exact, make_inputs
from ringattn.layout import LAYOUTS
from ringattn.plan import make_plan
from ringattn.sinks import seen_by_sinks
from ringattn.transport import simulated
from ringattn.transport.interface import Put
from ringattn.transport.simulated import Network, SimulatedTransport, simulate

BLOCK = 4
USUAL = pull.BLOCK


class Patient(ReferenceKernel):
    """Waits for every (source, head) that it is about to read, head by head; reads whole blocks. Gradients that it
    stores at home, those of whole blocks too, travel for a while."""

    waits = True

    def __init__(self, rank, transport, hasty=False):
        self.rank, self.transport, self.hasty = rank, transport, hasty

    def arrived(self, k, v, segments, arrival, blocks):
        """Keys and values of a head after the other, on the axis of slots; what is not read of them is zero."""
        slot, flags = arrival.slot, arrival.flags
        begun = self.transport.words(self.rank)[pull.KEYS].ge(arrival.epoch)
        assert begun.sum() == len(self.transport.ends) - 1, "somebody may not have begun"
        sources = sorted({segment.k_start // slot - 1 for segment in segments if segment.k_start >= slot})
        k, v = (pad(x, (0, 0, 0, 0, 0, slot - x.shape[1])) for x in (k, v))
        read = torch.zeros(slot + arrival.v.shape[1], 1, 1, dtype=torch.bool)
        for segment in segments:  # what is masked is multiplied by zero, up to the end of a block
            read[blocks(segment)] = True
        for g in range(k.shape[2]):

            def here(flag=g * flags.shape[1] // k.shape[2]):
                return all(flags[source, flag] >= arrival.epoch for source in sources)

            self.transport.clock.wait(self.rank, (lambda: True) if self.hasty else here, lambda: "flags")
            yield tuple(torch.cat(x, 1)[:, :, g : g + 1].where(read, 0.0) for x in ((k, arrival.k), (v, arrival.v)))

    def forward(self, q, k, v, segments, *, arrival=None, running=None, **options):
        assert arrival is not None
        outs, lses = [], []
        ratio = q.shape[2] // k.shape[2]

        def blocks(segment):
            return slice(segment.k_start, segment.k_start - segment.k_len // -BLOCK * BLOCK)

        for g, (k_g, v_g) in enumerate(self.arrived(k, v, segments, arrival, blocks)):
            heads = slice(g * ratio, (g + 1) * ratio)
            seen = running and (running[0][:, :, heads], running[1][:, heads])
            out, lse = super().forward(q[:, :, heads], k_g, v_g, segments, running=seen, **options)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, 2), torch.cat(lses, 1)

    def backward(self, dout, q, k, v, out, lse, delta, segments, *, arrival=None, homes=(), **options):
        assert arrival is not None

        def blocks(segment):  # as keys are cut in tiles
            end = segment.k_start + segment.k_len
            return slice(segment.k_start // BLOCK * BLOCK, -(-end // BLOCK) * BLOCK)

        own = k.shape[1]
        k, v = (torch.cat(x, 2) for x in zip(*self.arrived(k, v, segments, arrival, blocks), strict=True))
        dq, dk, dv = super().backward(dout, q, k, v, out, lse, delta, segments, **options)
        unseen = torch.ones(k.shape[1], dtype=torch.bool)
        for segment in segments:
            unseen[blocks(segment)] = False
        unseen[:own] = False
        dk[:, unseen] = dv[:, unseen] = torch.nan
        puts = [
            Put(home, number, (slice(None), slice(source * arrival.slot, source * arrival.slot + home.shape[1])))
            for source, pair in enumerate(homes, 1)
            for number, home in enumerate(pair)
        ]
        self.transport.copy(puts, (dk.contiguous(), dv.contiguous()))
        return dq, dk[:, :own], dv[:, :own]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pull, "BLOCK", BLOCK)


def attend(plan, case, inputs, network, calls=1, hasty=False, groups=2, sinks=None):
    def work(rank, transport):
        kernel = Patient(rank, transport, hasty)
        schedule = Schedule(flags=True, at_once=True, head_groups=groups)
        call = Call(plan, rank, kernel, case.head_dim**-0.5, transport, Buffers(), transport, schedule)
        q, k, v, dout = (plan.layout.shard(x, rank, 1) for x in inputs)
        for number in range(calls):  # earlier calls have other keys, and leave them in memory
            running = None if sinks is None else seen_by_sinks(sinks, q, v)
            keys = k + (calls - 1 - number), v - (calls - 1 - number)
            out, lse = pull.forward(call, q, *keys, running)
            grads = pull.backward(call, dout, q, *keys, out, lse, None)
            if number == 0:  # and all sorts of things may be there
                transport.barrier()
                for index in range(2):
                    transport.region(rank, index).fill_(0xFF)
                transport.barrier()
        return out, *grads

    parts = simulate(plan.ranks, work, network)
    return Result(*(plan.layout.unshard(shards, 1) for shards in zip(*parts, strict=True)))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_to_one_rank_in_any_order_of_arrival(layout, ranks):
    for causal in (True, False):
        case = Case(2 * ranks * BLOCK * 3 + (not causal), 2, 8, 4, 8, causal)
        plan = make_plan(layout, case.seq_len, ranks, causal=causal)
        inputs = make_inputs(case, 0)
        right = exact(case, inputs)
        for seed in range(4):
            found = attend(plan, case, inputs, Network(seed, spread=100), calls=3, groups=(1, 2, 4)[seed % 3])
            for got, expected in zip(found, right, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sinks_windows_and_documents_of_any_length(layout):
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    for seed, (window, documents) in enumerate(((9, None), (None, (0, 5, 30, 31, 70)), (None, None))):
        case = Case(75, 2, 4, 2, 8, window=window, documents=documents)
        plan = make_plan(layout, case.seq_len, 3, **case.mask)
        inputs = make_inputs(case, seed)
        whole = make_plan("contiguous", case.seq_len, 1, **case.mask).segments(0, 0)
        running = seen_by_sinks(sinks, inputs.q, inputs.v)
        right, _ = ReferenceKernel().forward(*inputs[:3], whole, scale=case.head_dim**-0.5, running=running)
        got = attend(plan, case, inputs, Network(seed, spread=100), calls=3, sinks=sinks)
        torch.testing.assert_close(got.out, right, rtol=1e-12, atol=1e-12)
        got = attend(plan, case, inputs, Network(seed, spread=100), calls=3)
        for x, expected in zip(got, exact(case, inputs), strict=True):
            torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


def test_a_kernel_that_does_not_wait_is_found_out():
    case = Case(48, 1, 2, 2, 8)
    plan = make_plan("zigzag", 48, 2, causal=True)
    inputs = make_inputs(case, 0)
    found = attend(plan, case, inputs, Network(spread=100), hasty=True)
    assert all(x.isnan().any() for x in (found.out, found.dq))


def test_gradients_of_keys_that_nobody_sees_between_others_that_are_seen():
    """They are not stored at home, where anything may be."""
    case = Case(512, 2, 4, 2, 8, documents=(0, 306, 336, 412, 512))
    plan, inputs = make_plan("balanced", 512, 2, **case.mask), make_inputs(case, 0)
    assert pull.delivered(plan, 1, 0) == [(0, 128), (208, 256)]
    found = attend(plan, case, inputs, Network(spread=100), calls=2)
    for x, expected in zip(found, exact(case, inputs), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_hopper_kernel_delivers_what_owners_read(monkeypatch, seed):
    """Tiles of the others' keys, and stretches of own keys, in any plan."""
    launch = pytest.importorskip("ringattn.kernels.hopper_backward_launch")
    assert launch.KEYS == USUAL
    monkeypatch.setattr(pull, "BLOCK", USUAL)
    draw = random.Random(seed)
    ranks, seq_len = draw.randint(2, 8), draw.randint(1, 9000)
    window = draw.randint(0, seq_len), draw.choice((-1, 0, 300))
    mask: dict[str, Any] = {"causal": True} if seed % 2 else {"window_size": window}
    if draw.random() < 0.7:
        mask["cu_seqlens"] = sorted({0, *(draw.randint(0, seq_len) for _ in range(draw.randint(1, 30)))})
    plan = make_plan(draw.choice(list(LAYOUTS)), seq_len, ranks, **mask)
    slot = pull.slot_of(plan)
    for rank, own in enumerate(plan.layout.lengths):
        axis = pull.remote_axis(plan, rank, slot)
        tiles = launch.lower(axis.segments, slot + axis.length, (slot, own)).work.tiles[:, 0].tolist()
        assert sorted(key for key in tiles if key < slot) == list(range(0, own, USUAL))
        for first, piece in zip(range(slot, len(axis.pieces) * slot + 1, slot), axis.pieces, strict=True):
            starts = sorted(piece.start + key - first for key in tiles if first <= key < first + slot)
            stretches = pull.delivered(plan, rank, piece.source)
            assert starts == [start for stretch in stretches for start in range(*stretch, USUAL)]
            assert all(stop == piece.stop or (stop - start) % USUAL == 0 for start, stop in stretches)


def test_a_flag_of_the_next_call_is_not_taken_for_a_slow_one(monkeypatch):
    """Layers whose heads come in other groups, in turn: keys from rank 2 are slow to come to rank 0, and meanwhile
    rank 1 begins the next call. Memory holds old numbers, not NaN."""
    ranks, groups = 3, (4, 2, 4, 1, 4, 2, 1, 2)
    travel = SimulatedTransport.travel

    def slow(self, sender, receiver, nbytes, arrive, after=0.0):
        return travel(self, sender, receiver, nbytes and nbytes + 10**9 * ((sender, receiver) == (2, 0)), arrive, after)

    monkeypatch.setattr(SimulatedTransport, "travel", slow)
    monkeypatch.setattr(simulated, "spoil", lambda tensor: None)
    case = Case(2 * ranks * BLOCK * 3, 1, 8, 4, 8, True)
    plan, inputs = make_plan("zigzag", case.seq_len, ranks, causal=True), make_inputs(case, 0)

    def work(rank, transport):
        q, k, v, _ = (plan.layout.shard(x, rank, 1) for x in inputs)
        kernel, scale = Patient(rank, transport), case.head_dim**-0.5
        calls = {
            n: Call(plan, rank, kernel, scale, transport, Buffers(), transport, Schedule(flags=True, head_groups=n))
            for n in groups
        }
        return [pull.forward(calls[n], q, k + number, v - number)[0] for number, n in enumerate(groups)]

    for seed in range(4):
        everything = zip(*simulate(ranks, work, Network(seed, spread=2)), strict=True)
        for number, shards in enumerate(everything):
            right = exact(case, inputs._replace(k=inputs.k + number, v=inputs.v - number)).out
            torch.testing.assert_close(plan.layout.unshard(shards, 1), right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_memory_keeps_to_what_is_foretold(ranks, window):
    """Nothing but regions."""
    tokens, heads, head_dim = 64, 2, 8
    plan = make_plan("zigzag", tokens * ranks, ranks, causal=True, window_size=window)

    def work(rank, transport):
        schedule = Schedule(flags=True, at_once=True, head_groups=2)
        call = Call(plan, rank, Patient(rank, transport), 1.0, transport, Buffers(), transport, schedule)
        q, k, v, dout = torch.randn(4, 1, tokens, heads, head_dim)
        pull.backward(call, dout, q, k, v, *pull.forward(call, q, k, v), None)
        return sum(region.numel() for region in transport.regions)

    shape = 1, heads, heads, head_dim, head_dim, 4
    load = Workload(plan, "reference", *shape, same_node=True, waits=True, delivers=True, memory=1)
    foretold = next(x for x in predict(load) if x.schedule[:2] == (True, True) and x.schedule.head_groups == 2)
    assert max(simulate(ranks, work)) <= foretold.memory
