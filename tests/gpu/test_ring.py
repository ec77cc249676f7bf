"""The public face on all GPUs over NCCL."""

import random

import pytest
import torch

from tests.gang import run_ranks
from tests.ranks.test_attention import CASES, check_cases

GPUS = torch.cuda.device_count()

pytestmark = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")


def test_equal_to_one_rank():
    run_ranks(GPUS, check_cases, random.Random(0).sample(CASES, 100), "cuda", backend="nccl", timeout=110)
