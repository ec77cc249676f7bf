"""The worked examples in docstrings hold, to the letter."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from ringattn.kernels import segments, tiles

ROOT = Path(__file__).parents[2]
FOLDERS = {"ringattn": "ringattn", "kernels": "ringattn.kernels", "launch": "ringattn.launch"}
MODULES = sorted(
    ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts))
    for folder, package in FOLDERS.items()
    for path in (ROOT / folder).rglob("*.py")
    if re.search(r"^\s+>>> ", path.read_text(), re.MULTILINE)
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        pytest.skip("needs Triton")
    result = doctest.testmod(module, extraglobs=vars(segments) | vars(tiles) | vars(module))
    assert result.attempted > 0
    assert result.failed == 0
