"""pull in one launch that looks itself which keys have come: each is read after its flag, in any order of arrival."""

import pytest
import torch

from ringattn.executors import pull
from ringattn.executors.call import Buffers, Call, Schedule
from ringattn.kernels.reference import ReferenceKernel
from ringattn.launch.oracle import Case, exact, make_inputs
from ringattn.layout import LAYOUTS
from ringattn.plan import make_plan
from ringattn.transport.simulated import Network, simulate

BLOCK = 4


class Patient(ReferenceKernel):
    """Waits for every (source, head) that it is about to read, head by head."""

    waits = True

    def __init__(self, rank, transport, hasty=False):
        self.rank, self.transport, self.hasty = rank, transport, hasty

    def forward(self, q, k, v, segments, *, arrival=None, **options):
        assert arrival is not None
        sources = sorted({segment.k_start // arrival.slot for segment in segments})
        outs, lses = [], []
        ratio = q.shape[2] // k.shape[2]
        for g in range(k.shape[2]):

            def here(g=g):
                return all(arrival.flags[source, g] >= arrival.epoch for source in sources)

            self.transport.clock.wait(self.rank, (lambda: True) if self.hasty else here, lambda: "flags")
            heads, group = slice(g * ratio, (g + 1) * ratio), slice(g, g + 1)
            out, lse = super().forward(q[:, :, heads], k[:, :, group], v[:, :, group], segments, **options)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, 2), torch.cat(lses, 1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pull, "BLOCK", BLOCK)


def attend(plan, case, inputs, network, calls=1, hasty=False):
    def work(rank, transport):
        kernel = Patient(rank, transport, hasty)
        schedule = Schedule(own_first=False, flags=True)
        call = Call(plan, rank, kernel, case.head_dim**-0.5, transport, Buffers(), transport, schedule)
        q, k, v, _ = (plan.layout.shard(x, rank, 1) for x in inputs)
        for number in range(calls):  # earlier calls have other keys, and leave them in memory
            out, _ = pull.forward(call, q, k + (calls - 1 - number), v - (calls - 1 - number))
        return out

    return plan.layout.unshard(simulate(plan.ranks, work, network), 1)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_to_one_rank_in_any_order_of_arrival(layout, ranks):
    for causal in (True, False):
        case = Case(2 * ranks * BLOCK * 3, 2, 8, 4, 8, causal)
        plan = make_plan(layout, case.seq_len, ranks, causal=causal)
        if pull.slot_of(plan) is None:
            assert (layout, causal) == ("striped", True)  # a rank before another sees one key less
            continue
        inputs = make_inputs(case, 0)
        right = exact(case, inputs).out
        for seed in range(4):
            got = attend(plan, case, inputs, Network(seed, spread=100), calls=3)
            torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def test_a_kernel_that_does_not_wait_is_found_out():
    case = Case(48, 1, 2, 2, 8)
    plan = make_plan("zigzag", 48, 2, causal=True)
    inputs = make_inputs(case, 0)
    assert attend(plan, case, inputs, Network(spread=100), hasty=True).isnan().any()


def test_lengths_that_end_within_a_block_cannot_wait():
    assert pull.slot_of(make_plan("zigzag", 50, 2, causal=True)) is None
