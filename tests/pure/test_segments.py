"""Segments against the mask that they stand for."""

import random

import pytest
import torch

from ringattn.kernels.aten import native_pieces
from ringattn.kernels.reference import visible_pairs
from ringattn.kernels.segments import NO_WINDOW, Segment, Segments


def random_segments(count: int, seed: int) -> list[Segment]:
    draw = random.Random(seed)
    return [
        Segment(
            draw.randint(0, 5), draw.randint(0, 12), draw.randint(0, 5), draw.randint(0, 12), draw.randint(-15, 15),
            draw.choice([NO_WINDOW, draw.randint(0, 15)]),
        )
        for _ in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("segment", random_segments(500, seed=0), ids=str)
def test_canonical_form_keeps_the_pairs(segment):
    mask = visible_pairs(Segments([segment]), 20, 20)
    assert segment.pairs == mask.sum()
    canonical = segment.canonical()
    if canonical is None:
        assert not mask.any()
        return
    assert torch.equal(mask, visible_pairs(Segments([canonical]), 20, 20))
    inside = mask[canonical.q_start : canonical.q_start + canonical.q_len]
    inside = inside[:, canonical.k_start : canonical.k_start + canonical.k_len]
    assert inside.any(1).all(), "every row sees a key"
    assert inside.any(0).all(), "every key is seen by a row"
    unmasked = canonical.offset == canonical.k_len - 1 and canonical.window == NO_WINDOW
    assert unmasked == bool(inside.all())


@pytest.mark.parametrize("segment", random_segments(500, seed=1), ids=str)
def test_native_pieces_cover_a_segment_once(segment):
    covered = torch.zeros(20, 20, dtype=torch.int64)
    for rows, keys, seen in native_pieces(Segments([segment])):
        piece = torch.ones(rows.stop - rows.start, keys.stop - keys.start, dtype=torch.int64)
        if seen != "whole":
            assert piece.shape[0] == piece.shape[1]
            piece = piece.tril() if seen == "causal" else piece.triu()
        covered[rows, keys] += piece
    assert torch.equal(covered, visible_pairs(Segments([segment]), 20, 20).long())


def test_derived_values_are_made_once():
    segments = Segments([Segment(0, 1, 0, 1, 0)])
    made = []
    for _ in range(2):
        segments.derive("tiles", lambda own: made.append(own))
    assert made == [segments]
