"""Packed documents on a GPU: whatever stands in one of them, no bit of another's results depends on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ringattn.kernels.interface import row_delta
from ringattn.kernels.registry import KERNELS
from ringattn.kernels.segments import Segments
from ringattn.plan import make_plan

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(120)]

BOUNDS = (0, 1, 700, 703, 1730, 1731, 3000, 4096)
HEADS, GROUPS, WIDTH = 8, 2, 128


def results(kernel: str, segments: Segments, x: list[Tensor]) -> tuple[Tensor, ...]:
    """out, lse, dq, dk and dv."""
    q, k, v, dout = x
    how = {"scale": WIDTH**-0.5}
    out, lse = KERNELS[kernel].forward(q, k, v, segments, **how, out_dtype=q.dtype)
    return out, lse, *KERNELS[kernel].backward(dout, q, k, v, out, lse, row_delta(dout, out), segments, **how)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("kernel", ["triton", "hopper"])
def test_documents_never_leak(kernel, window, monkeypatch):
    x = [torch.randn(1, BOUNDS[-1], heads, WIDTH, device="cuda").bfloat16() for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    refusal = KERNELS[kernel].refuses(*x[:3])
    if refusal:
        pytest.skip(refusal)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)  # dq, too, bit by bit
    plan = make_plan("contiguous", BOUNDS[-1], 1, causal=True, window_size=window, cu_seqlens=BOUNDS)
    segments = plan.segments(0, 0)
    before = results(kernel, segments, x)
    assert all(part.isfinite().all() for part in before)
    for changed in (slice(0, 1), slice(703, 1730), slice(3000, 4096)):
        y = [tensor.clone() for tensor in x]
        for tensor in y:
            tensor[:, changed] = 100 * torch.randn_like(tensor[:, changed])
        after = results(kernel, segments, y)
        assert not torch.equal(before[0][:, changed], after[0][:, changed])
        for one, other in zip(before, after, strict=True):
            one, other = (part.transpose(1, 2) if part.dim() == 3 else part for part in (one, other))  # lse
            same = (one == other).flatten(2).all(2)[0]
            assert same[: changed.start].all()
            assert same[changed.stop :].all()
