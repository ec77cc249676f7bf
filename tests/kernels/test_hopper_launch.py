"""What the Hopper forward is launched on, and who holds which results. No GPU is needed: nothing is launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ringattn.kernels.interface import Arrival
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


@pytest.mark.parametrize(
    ("heads", "groups", "d", "together"),
    [(32, 8, 128, 2), (32, 1, 128, 2), (6, 2, 128, 1), (4, 4, 128, 1), (8, 2, 64, 1), (12, 2, 64, 3), (4, 2, 256, 2)],
)
def test_every_row_of_every_head_once(heads: int, groups: int, d: int, together: int, monkeypatch: pytest.MonkeyPatch):
    """As the warpgroups count them: part p of a tile takes 64 rows, of head p mod `together`."""
    from ringattn.kernels import hopper_forward_launch

    launches = []
    monkeypatch.setattr(hopper_forward_launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(hopper_forward_launch, "launch", lambda *arguments, **more: launches.append(arguments))
    batch, rows = 2, 1000
    q = torch.empty(batch, rows, heads, d, dtype=torch.bfloat16)
    k, v = torch.empty(2, batch, rows, groups, d, dtype=torch.bfloat16)
    segments = Segments([Segment(70, 900, 0, rows, 0)])  # tiles before and after see nothing
    hopper_forward_launch.forward(q, k, v, segments, 0.1, None, q.dtype)
    ((_, _, (programs, _, _), arguments, _, constants),) = launches
    pieces, parts = arguments[6], dict(constants)["PARTS"]
    assert dict(constants)["TOGETHER"] == together
    assert pieces.shape[1] == programs
    written = []
    for program in range(programs):
        for head0, row0, _, _ in pieces[1 : 1 + pieces[0, program, 0], program].tolist():
            of = [(head0 + part % together, row0 + part // together * 64) for part in range(parts)]
            assert len({head // (heads // groups) for head, _ in of}) == 1  # which share keys
            written += [(head, row) for head, row in of if row < rows]
    assert sorted(written) == [(head, row) for head in range(batch * heads) for row in range(0, rows, 64)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("batch", "heads", "groups"), [(1, 8, 2), (2, 6, 2), (1, 64, 8)])
def test_keys_on_their_way(batch, heads, groups, deterministic, monkeypatch: pytest.MonkeyPatch):
    """Every tile of own keys and of the others', for all heads, once; who shares one comes right behind who stores it
    first; whoever waits for turns waits for tiles that come before."""
    from ringattn.kernels import hopper_backward_launch

    launches = []
    monkeypatch.setattr(hopper_backward_launch, "launch", lambda *arguments: launches.append(arguments))
    own, slot, far = 1000, 1280, 1280 + 300  # of two sources, the first of which has 200 keys
    q, dout = torch.empty(2, batch, own, heads, 128, dtype=torch.bfloat16)
    k, v, far_k, far_v = (torch.empty(batch, n, groups, 128, dtype=torch.bfloat16) for n in (own, own, far, far))
    lse = delta = torch.empty(batch, heads, own)
    stretches = (0, own), (slot, 200), (2 * slot, 100), (2 * slot + 260, 40)
    segments = Segments([Segment(0, own, start, n, 0) for start, n in stretches])
    words = torch.zeros(2, groups, dtype=torch.int32)
    arrival = Arrival(far_k, far_v, words, words[:1, 0], slot, 1, words[:1, 0])
    inputs = dout, q, k, v, lse, delta, segments, 0.1, None, None, None, deterministic
    homes = [torch.empty(2, batch, n, groups, 128) for n in (200, 300)]
    _, dk, dv = hopper_backward_launch.backward(*inputs, arrival=arrival, homes=homes)
    assert dk.shape == dv.shape == k.shape
    _, (_, _, (programs, _, _), arguments, _, constants) = launches
    assert dict(constants)["WAIT"]
    order, (own_home, *told), shared = arguments[10].tolist(), arguments[26:34], arguments[34]
    assert len(order) == programs
    keys, shares = (*range(0, 1024, 128), 1280, 1408, 2560, 2816), heads // groups // dict(constants)["SHARE"]
    assert sorted(row[:2] for row in order) == [[unit, key] for unit in range(batch * groups * shares) for key in keys]
    assert own_home.base.data_ptr() == dk.data_ptr()
    assert own_home.base.shape[0] == 2 * batch
    assert [x.base.data_ptr() for x in told[:2]] == [x.data_ptr() for x in homes]
    assert told[2:] == [None] * 5
    assert shared.numel() == (programs if shares > 1 else 0)
    pairs = zip(order[::shares], order[shares - 1 :: shares], strict=True)
    assert all(second[:2] == [first[0] + shares - 1, first[1]] for first, second in pairs)
    assert all(unit % shares == i % shares for i, (unit, *_) in enumerate(order))
    assert [unit // shares % groups for unit, key, *_ in order if key == 0] == sorted([*range(groups)] * batch * shares)
    if deterministic:
        runs, visits, turns = (x.tolist() for x in arguments[11:14])
        been = [0] * 8  # at each 128 rows, of the first head
        for run in (run for unit, _, begin, end in order if unit == 0 for run in range(begin, end)):
            start, length, head, tail = runs[run][:4]
            for n in range(-(-length // 128)):
                masked = (-(-length // 128) - 1 - n) * 128
                masked += tail - head if masked >= head else 0
                cell = (start + (tail - (n + 1) * 128 if n < (tail - head) // 128 else masked)) // 128
                assert turns[visits[run] + n] == [been[cell], -1]
                been[cell] += 1
        assert min(been) > 0


@pytest.mark.parametrize("columns", [64, 128, 256])
def test_what_follows_from_the_lane(columns: int):
    """As `rows_of` and `columns_of` have it, of results that are stored side by side."""
    from ringattn.kernels.hopper_rows import columns_of_a_lane, wide_layout

    layout: Any = wide_layout(64, columns)
    each = columns_of_a_lane(layout)
    assert each == 8
    for bit, (row, column) in enumerate(layout.lane_bases):
        assert (row, column) == ((1 << bit) >> 2, ((1 << bit) & 3) * each)
    for row, column in (*layout.reg_bases, *layout.warp_bases):
        assert row & 7 == 0
        assert column & (3 * each) == 0
