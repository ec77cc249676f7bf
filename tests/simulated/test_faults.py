"""Lost messages, dead ranks, bytes on the wire; and that the simulator does find out who breaks the rules."""

import pytest
import torch

from ringattn.executors import gather, pull, ring
from ringattn.executors.axis import span
from ringattn.executors.call import Buffers, Call
from ringattn.kernels.registry import KERNELS
from ringattn.layout import LAYOUTS
from ringattn.plan import make_plan
from ringattn.transport.interface import Mark, Message, Put, TransportError
from ringattn.transport.simulated import Network, simulate
from ringattn.transport.virtual_time import RankDied

EXECUTORS = {"ring": ring, "gather": gather, "pull": pull}
TOKENS, HEADS, HEAD_DIM = 8, 2, 4


def steps(executor: str, plan, count: int = 3):
    """Work of some attention steps, forward and backward."""

    def work(rank, transport):
        symmetric = transport if executor == "pull" else None
        call = Call(plan, rank, KERNELS["reference"], 0.5, transport, Buffers(), symmetric)
        for _ in range(count):
            q, k, v, dout = torch.ones(4, 1, plan.layout.lengths[rank], HEADS, HEAD_DIM)
            out, lse = EXECUTORS[executor].forward(call, q, k, v)
            EXECUTORS[executor].backward(call, dout, q, k, v, out, lse, None)
        return transport.clock.now[rank]

    return work


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("executor", EXECUTORS)
def test_when_a_rank_dies_all_others_raise_within_a_few_deadlines(executor, seed):
    plan = make_plan("zigzag", 4 * TOKENS, 4, causal=False)
    whole = max(Network(seed).run(4, steps(executor, plan)))
    for moment in (0.1, 0.4, 0.6):  # of three steps: nobody has all it needs yet
        network = Network(seed, deadline=1.0, deaths={2: whole * moment})
        outcomes = network.run(4, steps(executor, plan))
        assert isinstance(outcomes.pop(2), RankDied)
        assert all(isinstance(outcome, TransportError) for outcome in outcomes), outcomes
        assert any("2" in str(outcome) for outcome in outcomes), "someone names the dead rank"


@pytest.mark.parametrize("executor", ["ring", "gather"])
def test_a_lost_message_raises_and_names_the_peer(executor):
    plan = make_plan("zigzag", 3 * TOKENS, 3, causal=False)
    outcomes = Network(deadline=1.0, lost={(0, 1): 1}).run(3, steps(executor, plan))
    assert isinstance(outcomes[1], TransportError)
    assert str(outcomes[1]).startswith("rank 1 waited 1 s for receives with [0]")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_on_the_wire(layout):
    """Ring: what the plan says. Pull: exactly the keys that are seen, and fp32 gradients of the same."""
    plan = make_plan(layout, 4 * TOKENS, 4, causal=True)
    token = 2 * HEADS * HEAD_DIM * 4
    seen = {(s, r): len(range(*span(plan, r, s))) * token for r in range(4) for s in range(4) if r != s}

    def forward(executor):
        def work(rank, transport):
            symmetric = transport if executor is pull else None
            call = Call(plan, rank, KERNELS["reference"], 0.5, transport, Buffers(), symmetric)
            executor.forward(call, *torch.ones(3, 1, TOKENS, HEADS, HEAD_DIM))

        network = Network()
        simulate(4, work, network)
        return network.bytes_sent

    sent = forward(ring)
    expected = [plan.bytes_sent(r, kv_heads=HEADS, head_dim=HEAD_DIM, itemsize=4) for r in range(4)]
    assert [sum(n for (a, _), n in sent.items() if a == rank) for rank in range(4)] == expected
    assert +forward(pull) == {pair: n for pair, n in seen.items() if n}
    network = Network()
    simulate(4, steps("pull", plan, 1), network)
    back = {(r, s): n for (s, r), n in seen.items()}
    assert +network.bytes_sent == {pair: n for pair in seen if (n := 2 * seen[pair] + back[pair])}


def fails(work, ranks: int = 2) -> bool:
    """Whether some seed lets the work fail."""
    for seed in range(20):
        outcomes = Network(seed, spread=100).run(ranks, work)
        assert all(outcome is None or isinstance(outcome, AssertionError | TransportError) for outcome in outcomes)
        if any(isinstance(outcome, AssertionError) for outcome in outcomes):
            return True
    return False


@pytest.mark.parametrize("regions", [1, 2])
def test_two_regions_in_turn_are_safe_and_one_is_not(regions):
    def work(rank, transport):
        transport.reserve([32] * 2)
        other = 1 - rank
        mark = Mark(transport.words(other)[0, rank : rank + 1])
        for step in range(20):
            mine, theirs = (transport.region(r, step % regions) for r in (rank, other))
            transport.begin()
            transport.copy([Put(theirs, 0, (slice(None),)), mark], [torch.full((32,), step, dtype=torch.uint8)])
            transport.hear(0, mine)
            transport.clock.wait(rank, lambda: True, str)
            assert (mine == step).all()
            transport.finish()

    assert fails(work) == (regions == 1)


@pytest.mark.parametrize("careful", [True, False])
def test_who_does_not_hear_reads_what_was_there_before(careful):
    def work(rank, transport):
        transport.reserve([32])
        other = 1 - rank
        mark = Mark(transport.words(other)[0, rank : rank + 1])
        transport.begin()
        transport.copy([Put(transport.region(other, 0), 0, (slice(None),)), mark], [torch.ones(32, dtype=torch.uint8)])
        if careful:
            transport.hear(0, transport.region(rank, 0))
        seen = transport.region(rank, 0).clone()
        transport.finish()
        assert (seen == 1).all()

    assert fails(work) != careful


@pytest.mark.parametrize("careful", [True, False])
def test_who_overwrites_before_the_copies_are_done_sends_garbage(careful):
    def work(rank, transport):
        transport.reserve([32])
        other, leaving = 1 - rank, torch.ones(32, dtype=torch.uint8)
        mark = Mark(transport.words(other)[0, rank : rank + 1])
        transport.begin()
        transport.copy([Put(transport.region(other, 0), 0, (slice(None),)), mark], [leaving])
        if careful:
            transport.finish()
        leaving.zero_()
        transport.hear(0, transport.region(rank, 0))
        assert (transport.region(rank, 0) == 1).all()
        transport.finish()

    assert fails(work) != careful


@pytest.mark.parametrize("careful", [True, False])
def test_who_reads_before_waiting_reads_nan(careful):
    def work(rank, transport):
        arriving = torch.zeros(4)
        wait = transport.exchange([Message(torch.ones(4), 1 - rank)], [Message(arriving, 1 - rank)])
        transport.clock.wait(rank, lambda: True, str)
        if careful:
            wait()
        seen = arriving.clone()
        wait()
        assert (seen == 1).all()

    assert fails(work) != careful


@pytest.mark.parametrize("careful", [True, False])
def test_who_overwrites_before_waiting_sends_garbage(careful):
    def work(rank, transport):
        arriving, leaving = torch.zeros(4), torch.ones(4)
        wait = transport.exchange([Message(leaving, 1 - rank)], [Message(arriving, 1 - rank)])
        if careful:
            wait()
        leaving.zero_()
        wait()
        assert (arriving == 1).all()

    assert fails(work) != careful


def test_a_run_repeats_exactly():
    plan = make_plan("zigzag", 4 * TOKENS, 4, causal=True)
    first, second = (Network(seed=7).run(4, steps("pull", plan)) for _ in range(2))
    assert first == second
