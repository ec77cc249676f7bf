"""Learning rate, weight decay and the flat buffer of gradients."""

import pytest
import torch
from torch import nn

from ringattn.launch import settings
from ringattn.launch.optimizer import Gradients, adamw, learning_rate

pytestmark = pytest.mark.timeout(30)


def test_learning_rate_warms_up_and_falls():
    chosen = settings.Optimizer(lr=2.0, warmup=10, final_share=0.1)
    rates = [learning_rate(step, 100, chosen) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)
    assert learning_rate(1, 5, settings.Optimizer(lr=2.0, warmup=0)) < 2.0
    assert learning_rate(5, 5, settings.Optimizer(lr=2.0, warmup=5)) == 2.0


def test_gradients_are_views_that_backward_adds_into():
    model, first = nn.Linear(3, 2), nn.Parameter(torch.ones(3))
    gradients = Gradients([first, *model.parameters()])
    for _ in range(2):
        model(first).square().sum().backward()
    assert first.grad is not None
    assert gradients.flat.data_ptr() == first.grad.data_ptr()
    twice = gradients.flat.clone()
    gradients.clear()
    model(first).square().sum().backward()
    assert torch.equal(twice, 2 * gradients.flat)


@pytest.mark.parametrize(("largest", "after"), [(1.0, 1.0), (100.0, 5.0)])
def test_clipping_shrinks_and_never_grows(largest: float, after: float):
    parameter = nn.Parameter(torch.zeros(2))
    gradients = Gradients([parameter])
    gradients.flat.copy_(torch.tensor([3.0, 4.0]))
    assert gradients.clip(largest).item() == 5.0
    assert parameter.grad is not None
    assert parameter.grad.norm().item() == pytest.approx(after)


def test_norms_do_not_decay():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.RMSNorm(2))
    matrices, norms = adamw(model, settings.Optimizer(weight_decay=0.5)).param_groups
    assert (matrices["weight_decay"], norms["weight_decay"]) == (0.5, 0.0)
    assert norms["params"] == [model[1].weight]
