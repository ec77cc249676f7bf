"""Configs compose, and what they must not hold is refused by name before any rank starts."""

import doctest
import importlib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException

import ringattn.conf
from ringattn.launch import settings

GROUPS = [
    f"{path.parent.name}={path.stem}"
    for path in sorted(Path(ringattn.conf.__path__[0]).glob("*/*.yaml"))
    if path.parent.name != "bench"
]
settings.register()


def composed(*overrides: str) -> settings.Train:
    with initialize_config_module("ringattn.conf", version_base="1.3"):
        return settings.resolve(compose("train", list(overrides)))


@pytest.mark.parametrize("choice", GROUPS)
def test_every_group_composes(choice: str):
    composed(choice, *(["data.folder=/somewhere"] if choice == "data=text" else []))


def test_a_preset_overrides_groups_and_is_overridden():
    chosen = composed("preset=demo_cpu", "steps=7")
    assert (chosen.model.dim, chosen.checkpoint.every, chosen.steps) == (96, 0, 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps=0: expected at least 1"),
        ("precision=fp16", "precision=fp16: expected one of auto, fp32, bf16"),
        ("model.dim=100", "model.dim=100: expected a multiple of model.heads=8"),
        ("model.dim=40", "model.dim=40: expected an even head dim"),
        ("model.kv_heads=3", "model.kv_heads=3: expected a divisor of heads=8"),
        ("data.validation_share=1", "data.validation_share=1.0"),
        ("optimizer.clip=0", "optimizer.clip=0.0"),
        ("optimizer.beta2=1", "optimizer.beta2=1.0"),
        ("parallel.device=tpu", "one of auto, cpu, cuda"),
        ("checkpoint.keep=0", "checkpoint.keep=0"),
    ],
)
def test_values_out_of_range_are_named(override: str, message: str):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        composed(override)


def test_ranks_context_and_batch_must_fit():
    with pytest.raises(ValueError, match=r"parallel\.context=2: expected a divisor of 3 ranks"):
        composed("parallel.ranks=3", "parallel.context=2")
    with pytest.raises(ValueError, match=r"data\.batch=3: expected a multiple of 2: 4 ranks, 2 per sequence"):
        composed("parallel.ranks=4", "parallel.context=2", "data.batch=3")
    assert composed("parallel.ranks=3").grid(3) == (1, 3)


@pytest.mark.parametrize("override", ["model.dimm=3", "model.dim=many", "optimizr.lr=1", "model=huge"])
def test_misspelt_keys_and_wrong_types_do_not_compose(override: str):
    with pytest.raises(ConfigCompositionException):
        composed(override)


@pytest.mark.parametrize("name", ["gang", "metrics", "optimizer", "report", "settings"])
def test_examples(name: str):
    """The worked examples in docstrings hold, to the letter."""
    result = doctest.testmod(importlib.import_module(f"ringattn.launch.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
