"""The worked examples in docstrings hold, to the letter."""

import doctest
import importlib

import pytest

MODULES = [
    "ringattn.agreement",
    "ringattn.balance",
    "ringattn.context",
    "ringattn.documents",
    "ringattn.kernels.aten",
    "ringattn.kernels.merge",
    "ringattn.kernels.segments",
    "ringattn.kernels.tiles",
    "ringattn.kernels.turns",
    "ringattn.launch.packing",
    "ringattn.layout",
    "ringattn.mask",
    "ringattn.pieces",
    "ringattn.plan",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs=vars(importlib.import_module("ringattn.kernels.segments")))
    assert result.attempted > 0
    assert result.failed == 0
