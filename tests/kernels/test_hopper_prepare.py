"""The pieces of lse and delta that the Hopper backward adds up, made by Triton's interpreter where there is no GPU."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.125


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_add_up(dtype: torch.dtype):
    from ringattn.kernels.hopper_prepare import DELTA, PIECES, WEIGHT_0, WEIGHT_1, WEIGHT_2, prepare_kernel

    rows, block, columns = 300, 256, PIECES.value
    generator = torch.Generator().manual_seed(0)
    lse, delta = (torch.randn(2, rows, generator=generator) * torch.logspace(-4, 6, rows)).to(DEVICE)
    lse[7] = -torch.inf
    pieces = torch.full((rows + 1, columns), torch.nan, dtype=dtype, device=DEVICE)
    dq = torch.full((rows + 1, 24), torch.nan, device=DEVICE)
    launch: Any = prepare_kernel[(-(-rows // block),)]
    launch(lse, delta, pieces, dq, SCALE, rows, D=24, BLOCK=block, BLOCK_D=32)
    assert pieces[rows].isnan().all(), "written past the end"
    assert dq[rows].isnan().all(), "written past the end"
    assert dq[:rows].eq(0).all()
    weights = torch.zeros(columns, 2, dtype=torch.float64, device=DEVICE)
    for i, weight in enumerate((WEIGHT_0, WEIGHT_1, WEIGHT_2)):
        weights[i, 0] = weights[DELTA.value + i, 1] = weight.value
    got_lse, got_delta = (pieces[:rows].double() @ weights).T
    assert got_lse[7] < -1e8, "a row that sees nothing must get P = 0"
    seen = lse.isfinite()
    torch.testing.assert_close(got_lse[seen], -lse.double()[seen] / SCALE, rtol=2.0**-23, atol=2.0**-31)
    torch.testing.assert_close(got_delta, -delta.double(), rtol=2.0**-23, atol=2.0**-31)
