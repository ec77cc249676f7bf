"""torch's CUDA kernels behind our interface, against the specification."""

import pytest
import torch

from tests.kernels.test_kernels import against_the_specification

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["aten", "cudnn"])
def test_random_segments(kernel, dtype, seed):
    against_the_specification(kernel, dtype, seed, "cuda")
