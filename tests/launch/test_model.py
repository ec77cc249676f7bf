"""The model alone, on one rank: the same weights everywhere, causal, positions relative."""

import pytest
import torch

import ringattn
from ringattn.launch import settings
from ringattn.launch.model import Transformer, rope, rope_turns

pytestmark = pytest.mark.timeout(30)
SHAPE = settings.Model(layers=2, dim=32, heads=4, kv_heads=2, hidden=48)


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    first = Transformer(SHAPE, seed=5).state_dict()
    torch.manual_seed(2)
    second, other = Transformer(SHAPE, seed=5).state_dict(), Transformer(SHAPE, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].dim() == 2)


def test_logits_do_not_see_the_future():
    model, cp = Transformer(SHAPE, seed=0), ringattn.ContextParallel()
    ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(ids, cp, 12), model(changed, cp, 12)
    assert before.shape == (2, 12, 256)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


def test_rope_is_a_rotation_that_makes_scores_relative():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()

    def score(q_position: int, k_position: int) -> float:
        q_turns, k_turns = (rope_turns(torch.tensor([p]), 16, 10000.0) for p in (q_position, k_position))
        return (rope(q, q_turns) * rope(k, k_turns)).sum().item()

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)
    turned = rope(q, rope_turns(torch.tensor([9]), 16, 10000.0))
    assert turned.dtype == q.dtype
    assert turned.norm().item() == pytest.approx(q.norm().item(), rel=1e-6)


def test_rope_keeps_its_precision_far_out():
    position = 2**24 + 1  # the first that fp32 cannot hold
    cosine, _ = rope_turns(torch.tensor([position]), 4, 10000.0)
    assert cosine[0, 0].item() == pytest.approx(torch.tensor(position, dtype=torch.float64).cos().item(), abs=1e-6)
