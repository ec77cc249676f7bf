"""The pieces of lse and delta that the Hopper backward adds up, made by Triton's interpreter where there is no GPU."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.125


@pytest.mark.parametrize("multiplied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_add_up(dtype: torch.dtype, multiplied: bool):
    from ringattn.kernels.hopper_prepare import DELTA, PIECES, WEIGHT_0, WEIGHT_1, WEIGHT_2, prepare_kernel

    batch, heads, lost, rows, block, columns, d, e = 2, 3, 2, 50, 32, PIECES.value, 24, 17
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-4, 6, heads * rows).view(heads, rows)
    lse, delta, dlse = (torch.randn(3, batch, heads, rows, generator=generator) * size).to(DEVICE)
    lse[1, 2, 7] = -torch.inf
    all_pieces = torch.full(((batch * heads + lost) * rows + 1, columns), 7.0, dtype=dtype, device=DEVICE)
    pieces, nans, behind = all_pieces.split((batch * heads * rows, lost * rows, 1))
    dq = torch.full((batch * heads * rows + 1, d), torch.nan, device=DEVICE)
    dout, out = torch.zeros(2, batch, rows, heads, e, device=DEVICE)
    dout[..., 4], out[..., 4] = delta.mT, 1.0
    dout[..., 16], out[..., 16] = dlse.mT, 1.0
    tensors = (dout, out, lse, dlse) if multiplied else (None, None, lse, delta)
    steps = (dout.stride()[:3], out.stride()[:3]) if multiplied else (None, None)
    launch: Any = prepare_kernel[(-(-rows // block) * heads, batch)]
    sizes = {"HEADS": heads, "LOST": lost, "D": d, "E": e, "BLOCK": block, "BLOCK_D": 32, "BLOCK_E": 32}
    launch(*tensors, all_pieces, dq, SCALE, rows, *steps, **sizes)
    assert nans.isnan().all()
    assert behind.eq(7).all(), "written past the end"
    assert dq[-1].isnan().all(), "written past the end"
    assert dq[:-1].eq(0).all()
    weights = torch.zeros(columns, 2, dtype=torch.float64, device=DEVICE)
    for i, weight in enumerate((WEIGHT_0, WEIGHT_1, WEIGHT_2)):
        weights[i, 0] = weights[DELTA.value + i, 1] = weight.value
    got_lse, got_delta = (pieces.double() @ weights).T.unflatten(1, lse.shape)
    assert got_lse[1, 2, 7] < -1e8, "a row that sees nothing must get P = 0"
    seen = lse.isfinite()
    torch.testing.assert_close(got_lse[seen], -lse.double()[seen] / SCALE, rtol=2.0**-23, atol=2.0**-31)
    expected = ((delta + dlse) - dlse if multiplied else delta).double()
    torch.testing.assert_close(got_delta, -expected, rtol=2.0**-23, atol=2.0**-31)
