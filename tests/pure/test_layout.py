"""Layouts: every token lives on one rank, and comes back from there."""

import pytest
import torch

from ringattn.layout import LAYOUTS, make_layout

SIZES = [(0, 1), (1, 1), (1, 4), (8, 2), (10, 3), (1000, 3), (17, 8), (64, 8)]


@pytest.mark.parametrize(("seq_len", "ranks"), SIZES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_lives_on_one_rank(name, seq_len, ranks):
    layout = make_layout(name, seq_len, ranks)
    positions = [layout.positions(rank) for rank in range(ranks)]
    assert tuple(len(p) for p in positions) == layout.lengths
    assert torch.cat(positions).sort().values.tolist() == list(range(seq_len))
    assert max(layout.lengths) - min(layout.lengths) <= {"zigzag": 2, "balanced": 32}.get(name, 1)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unshard_inverts_shard(name, dim):
    x = torch.arange(2 * 3 * 10).view(2, 3, 10).movedim(2, dim)
    layout = make_layout(name, 10, 3)
    parts = [layout.shard(x, rank, dim) for rank in range(3)]
    assert torch.equal(layout.unshard(parts, dim), x)


def test_shard_is_differentiable_and_a_copy():
    x = torch.arange(10.0, requires_grad=True)
    part = make_layout("striped", 10, 3).shard(x, 1, 0)
    part.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert part.data_ptr() != x.data_ptr()


def test_wrong_lengths_and_names_raise():
    layout = make_layout("zigzag", 10, 2)
    with pytest.raises(ValueError, match="got 9 tokens in dim 0"):
        layout.shard(torch.zeros(9), 0, 0)
    with pytest.raises(ValueError, match="pass the seq_len that was sharded"):
        layout.unshard([torch.zeros(5), torch.zeros(4)], 0)
    with pytest.raises(ValueError, match="choose one of contiguous, zigzag, striped, balanced"):
        make_layout("zigzig", 10, 2)
    with pytest.raises(ValueError, match="at least one rank"):
        make_layout("zigzag", 10, 0)
