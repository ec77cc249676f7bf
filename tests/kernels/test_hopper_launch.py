"""What the Hopper forward is launched on, and who does what there. No GPU is needed: nothing is launched."""

from __future__ import annotations

from collections import Counter
from types import FunctionType, SimpleNamespace

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


def dealt(programs: int, tiles: int, side: int, sections: int) -> list[list[tuple[int, int]]]:
    """Head and tile of all pieces of work of each program, in its order: the kernel's own rule, in Python."""
    from ringattn.kernels import hopper_tile

    table = [number for i_tile in range(tiles) for number in (i_tile, 1, 2)]
    work: list[list[tuple[int, int]]] = []
    for i_program in range(programs):
        language = SimpleNamespace(
            program_id=lambda axis, i=i_program: i,
            num_programs=lambda axis: programs,
            where=lambda condition, x, y: x if condition else y,
            cdiv=lambda x, y: -(-x // y),
            load=table.__getitem__,
        )
        known = {"gl": language, "NOWHERE": hopper_tile.NOWHERE.value}
        rounds_of, locate = (FunctionType(f.fn.__code__, known) for f in (hopper_tile.rounds_of, hopper_tile.locate))
        offers = [locate(i, 0, tiles, side) for i in range(rounds_of(tiles, side, tiles * side * sections))]
        assert all((begin, end) == (1, 2 if row0 < tiles else 1) for _, row0, begin, end in offers)
        work.append([(head, i_tile) for head, i_tile, _, _ in offers if i_tile < tiles])
    return work


@pytest.mark.parametrize(
    ("programs", "tiles", "side", "sections"),
    [
        (132, 128, 16, 2),
        (132, 86, 8, 8),
        (116, 86, 8, 8),
        (132, 64, 32, 1),
        (132, 16, 1, 32),
        (1, 3, 2, 2),
        (7, 7, 1, 1),
    ],
)
def test_dealing(programs: int, tiles: int, side: int, sections: int):
    """Every tile of every head exactly once; all about as many, and of a long causal sequence as much, within 2%."""
    work = dealt(programs, tiles, side, sections)
    times = Counter(piece for pieces in work for piece in pieces)
    assert times == {(head, i_tile): 1 for head in range(side * sections) for i_tile in range(tiles)}
    assert max(map(len, work)) - min(map(len, work)) <= 2
    blocks = [sum(tiles - i_tile for _, i_tile in pieces) for pieces in work]
    if tiles * side > 4 * programs:
        assert max(blocks) < 1.02 * sum(blocks) / programs
