"""The merge: exact, in any order, and without NaN for rows that have seen nothing."""

import itertools

import torch

from ringattn.kernels.interface import nothing_seen
from ringattn.kernels.merge import merge_
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.segments import Segment, Segments
from ringattn.launch.oracle import Case, make_inputs


def test_any_order_of_pieces_gives_the_whole():
    q, k, v, _ = make_inputs(Case(12, 2), seed=0)
    kernel = ReferenceKernel()
    whole = kernel.forward(q, k, v, Segments([Segment(0, 12, 0, 12, 0)]), scale=0.5)
    pieces = [Segment(0, 12, start, 4, -start) for start in (0, 4, 8)]  # later keys are seen by fewer rows
    parts = [kernel.forward(q, k, v, Segments([piece]), scale=0.5) for piece in pieces]
    for order in itertools.permutations(parts):
        out, lse = nothing_seen(q, v)
        for part in order:
            merge_(out, lse, *part)
        torch.testing.assert_close((out, lse), whole, rtol=1e-13, atol=1e-13)


def test_nothing_merged_with_nothing_is_nothing():
    out, lse = nothing_seen(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5))
    merge_(out, lse, *nothing_seen(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)))
    assert torch.equal(out, torch.zeros(1, 2, 3, 5))
    assert torch.equal(lse, torch.full((1, 3, 2), -torch.inf))


def test_far_apart_sums_do_not_overflow():
    out, lse = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), -1000.0)
    merge_(out, lse, torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1), 1000.0))
    assert out.item() == 2.0
    assert lse.item() == 1000.0
