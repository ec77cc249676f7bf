"""The public face on all GPUs over NCCL."""

import random

import pytest
import torch

from tests.gang import run_ranks
from tests.ranks import test_packed as packed
from tests.ranks.test_attention import CASES, check_cases

GPUS = torch.cuda.device_count()

pytestmark = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")


@pytest.mark.timeout(300)
def test_equal_to_one_rank():
    """All layouts, masks, lengths and batches with one choice of heads: every other one compiles kernels anew."""
    cases = [case for case in CASES if case[1] == (8, 2) and case[-1] != torch.float32]
    run_ranks(GPUS, check_cases, random.Random(0).sample(cases, 40), "cuda", backend="nccl", timeout=280)


@pytest.mark.timeout(300)
def test_packed_documents_and_windows():
    """All layouts; bf16 and one choice of heads, for the same reason."""
    cases = [case for case in packed.CASES if case[2] == (8, 2) and case[-1] != torch.float32]
    run_ranks(GPUS, packed.check_cases, random.Random(0).sample(cases, 40), "cuda", backend="nccl", timeout=280)
