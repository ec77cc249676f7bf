"""Every executor on all GPUs: results, a soak with delays, and the death of a rank."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

from ringattn import ranks
from tests.gang import run_ranks
from tests.ranks import test_packed as packed
from tests.ranks.test_attention import CASES, check_cases
from tests.soak import compile_ahead, die_in_the_middle, soak

GPUS = torch.cuda.device_count()
EXECUTORS = ["ring", "gather", "pull"]
DEADLINE = 8.0  # longer than one rank compiles what another need not
GANGS = 8  # that compile side by side

pytestmark = [pytest.mark.skipif(GPUS < 2, reason="needs two GPUs"), pytest.mark.timeout(600)]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_equal_to_one_rank(executor):
    """All layouts, masks, lengths and batches with one choice of heads: every other one compiles kernels anew."""
    cases = [case for case in CASES if case[1] == (8, 2) and case[-1] != torch.float32]
    run_ranks(GPUS, check_cases, random.Random(0).sample(cases, 40), "cuda", executor, backend="nccl", timeout=280)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_packed_documents_and_windows(executor):
    """All layouts; bf16 and one choice of heads, for the same reason."""
    cases = [case for case in packed.CASES if case[2] == (8, 2) and case[-1] != torch.float32]
    cases = random.Random(0).sample(cases, 40)
    run_ranks(GPUS, packed.check_cases, cases, "cuda", executor, backend="nccl", timeout=280)


def test_soak():
    """RINGATTN_SOAK sets the number of steps, each with one of the executors."""
    steps = int(os.environ.get("RINGATTN_SOAK", "1000"))
    executors = tuple(EXECUTORS)

    def ahead(part: int) -> None:
        run_ranks(GPUS, compile_ahead, "cuda", executors, part, GANGS, backend="nccl", timeout=280)

    with ThreadPoolExecutor(GANGS) as pool:
        list(pool.map(ahead, range(GANGS)))
    run_ranks(GPUS, soak, "cuda", executors, steps, backend="nccl", timeout=280)


def die_soon(rank: int, executor: str, where: str) -> str:
    ranks.DEADLINE = timedelta(seconds=DEADLINE)
    return die_in_the_middle(rank, "cuda", executor, DEADLINE, where)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_others_raise_when_a_rank_dies(executor, where):
    said = run_ranks(GPUS, die_soon, executor, where, backend="nccl", timeout=100, dying=(GPUS - 1,))
    assert all(f"waited {DEADLINE:g} s for" in message for message in said[:-1])
