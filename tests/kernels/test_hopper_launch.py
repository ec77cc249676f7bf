"""What the Hopper forward is launched on. No GPU is needed: nothing is launched."""

from __future__ import annotations

import pytest
import torch

from ringattn.kernels.segments import Segment, Segments

pytest.importorskip("triton")


@pytest.mark.parametrize("margin", [0, 16, 131, 500])
def test_room_for_others(margin: int, monkeypatch: pytest.MonkeyPatch):
    from ringattn.kernels import hopper_forward_launch

    grids = []
    monkeypatch.setattr(hopper_forward_launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(hopper_forward_launch, "launch", lambda kernel, device, grid, *rest, **more: grids.append(grid))
    q, k, v = torch.empty(3, 1, 4096, 32, 128, dtype=torch.bfloat16, device="meta")
    segments = Segments([Segment(0, 4096, 0, 4096, 0)])
    hopper_forward_launch.forward(q, k, v, segments, 0.1, None, q.dtype, margin=margin)
    processors = hopper_forward_launch.processors(q.device)
    assert grids == [(max(processors - margin, 1), 1, 1)]
