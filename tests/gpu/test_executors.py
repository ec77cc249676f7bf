"""Every executor on all GPUs: results, a soak with delays, and the death of a rank. On a single GPU `pull` alone, since
NCCL does not let ranks share one."""

import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import product

import pytest
import torch

import ringattn
from ringattn import preparation, ranks
from ringattn.cost import Choice
from ringattn.executors.call import Schedule
from ringattn.kernels.registry import choose_kernel
from ringattn.launch.oracle import (
    Case,
    Result,
    allowed_error,
    attend_across_ranks,
    attend_on_one_rank,
    error,
    exact,
    make_inputs,
)
from ringattn.ranks import group_name, ranks_named
from tests.gang import ranks_on_gpus, run_ranks
from tests.ranks import test_packed as packed
from tests.ranks.test_attention import CASES, check_cases
from tests.soak import compile_ahead, die_in_the_middle, soak
from tests.tolerance import assert_close

RANKS, BACKEND = ranks_on_gpus()
EXECUTORS = ["ring", "gather", "pull"] if BACKEND == "nccl" else ["pull"]
DEADLINE = 8.0  # longer than one rank compiles what another need not
GANGS = 12  # that compile side by side
BIT_EQUAL = [Case(8192, 1, 8, 2, 128, True, torch.bfloat16), Case(3000, 2, 4, 4, 64, False, torch.float16)]
REPETITIONS = 10

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(600)]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper GPUs"
)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_equal_to_one_rank(executor):
    """All layouts, masks, lengths and batches with one choice of heads: every other one compiles kernels anew."""
    cases = [case for case in CASES if case[1] == (8, 2) and case[-1] != torch.float32]
    run_ranks(RANKS, check_cases, random.Random(0).sample(cases, 40), "cuda", executor, backend=BACKEND, timeout=280)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_packed_documents_and_windows(executor):
    """All layouts; bf16 and one choice of heads, for the same reason."""
    cases = [case for case in packed.CASES if case[2] == (8, 2) and case[-1] != torch.float32]
    cases = random.Random(0).sample(cases, 40)
    run_ranks(RANKS, packed.check_cases, cases, "cuda", executor, backend=BACKEND, timeout=280)


def test_soak():
    """RINGATTN_SOAK sets the number of steps, each with one of the executors."""
    steps = int(os.environ.get("RINGATTN_SOAK", "1000"))
    executors = tuple(EXECUTORS)

    def ahead(part: int) -> None:
        run_ranks(RANKS, compile_ahead, "cuda", executors, part, GANGS, backend=BACKEND, timeout=280)

    with ThreadPoolExecutor(GANGS) as pool:
        list(pool.map(ahead, range(GANGS)))
    run_ranks(RANKS, soak, "cuda", executors, steps, backend=BACKEND, timeout=280)


def die_soon(rank: int, executor: str, where: str) -> str:
    ranks.DEADLINE = timedelta(seconds=DEADLINE)
    return die_in_the_middle(rank, "cuda", executor, DEADLINE, where)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_others_raise_when_a_rank_dies(executor, where):
    said = run_ranks(RANKS, die_soon, executor, where, backend=BACKEND, timeout=100, dying=(RANKS - 1,))
    assert all(f"waited {DEADLINE:g} s for" in message for message in said[:-1])


def bits_of_results(rank: int, executors: tuple[str, ...]) -> list[str]:
    """A digest of each result, the same from call to call, and near those of the other executors."""
    digests = []
    for case in BIT_EQUAL:
        inputs = make_inputs(case, 0, "cuda")
        right, baseline = (
            exact(case, inputs),
            attend_on_one_rank(choose_kernel("hopper", *inputs[:3]).kernel, case, inputs),
        )
        found = []
        for executor in executors:
            cp = ringattn.ContextParallel(kernel="hopper", executor=executor, deterministic=True)
            first, *others = (attend_across_ranks(cp, case, inputs) for _ in range(REPETITIONS))
            assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)), executor
            assert_close(first, right, baseline)
            digests += [hashlib.sha256(x.view(torch.uint8).cpu().numpy().tobytes()).hexdigest() for x in first]
            found.append(first)
        for other in found[1:]:
            for name, a, b, base, x in zip(Result._fields, found[0], other, baseline, right, strict=True):
                assert error(a, b.double()) <= allowed_error(base, x), name
    return digests


@needs_hopper
def test_bit_equal_from_run_to_run():
    """All gradients, dq too, with the Hopper kernels: from call to call and in new processes."""
    first, second = (
        run_ranks(RANKS, bits_of_results, tuple(EXECUTORS), backend=BACKEND, timeout=140) for _ in range(2)
    )
    assert first == second
    assert first[0] == first[1]


def in_a_new_thread(rank: int) -> bool:
    """Whether a thread that has not used CUDA computes the same as this one, which is there for the second time."""
    case = BIT_EQUAL[1]
    q, k, v, _ = make_inputs(case, 0, "cuda")
    cp = ringattn.ContextParallel(executor="pull")

    def attend() -> torch.Tensor:
        torch.cuda.set_device(q.device)
        return cp.attention(*shards, causal=case.causal)

    with torch.no_grad():
        shards = [cp.shard(x) for x in (q, k, v)]
        first, second = attend(), attend()
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(attend).result()
    return torch.equal(first, second) and torch.equal(first, third)


def test_in_a_thread_that_has_not_used_cuda():
    assert all(run_ranks(RANKS, in_a_new_thread, backend=BACKEND, timeout=60))


SCHEDULES = [
    Schedule(flags=flags, head_groups=groups, **way)
    for flags, groups in ((False, 1), (True, 2))
    for way in ({}, {"halves": False}, {"at_once": True})
]


def errors_of_schedules(rank: int) -> None:
    """Causal and packed, the layouts that hide something from somebody; twice each, so that memory is in use again."""
    documents = (0, 1, 700, 701, 2048, 3000, 4096)
    dense, packed = Case(4096, 1, 8, 2, 128, True, torch.bfloat16), Case(4096, 2, 8, 2, 64, True, torch.bfloat16)
    for layout, case in product(("zigzag", "balanced"), (dense, packed._replace(documents=documents))):
        inputs = make_inputs(case, 0, "cuda")
        right = exact(case, inputs)
        baseline = attend_on_one_rank(choose_kernel("hopper", *inputs[:3]).kernel, case, inputs)
        for schedule in SCHEDULES:
            preparation.choose = lambda *_, chosen=schedule: Choice("pull", chosen, "asked for by a test")
            cp = ringattn.ContextParallel(kernel="hopper", layout=layout, executor="pull")
            ranks_named(group_name(None)).agreed.clear()
            for _ in range(2):
                assert_close(attend_across_ranks(cp, case, inputs), right, baseline)


@needs_hopper
def test_every_schedule_of_pull():
    run_ranks(RANKS, errors_of_schedules, backend=BACKEND, timeout=140)
