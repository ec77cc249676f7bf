"""`import ringattn` asks for torch and nothing more: no GPU, no triton, nothing of what only launch/ needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(60)

OPTIONAL = {"triton", "hydra", "omegaconf", "matplotlib", "rich", "tensorboard"}


def test_works_where_only_torch_is_installed(root: Path, tmp_path: Path, python: Callable[..., str]):
    code = f"""
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
import ringattn
print(len([getattr(ringattn, name) for name in ringattn.__all__]))
"""
    assert int(python(code, cwd=tmp_path, search=root)) > 0


def test_loads_nothing_that_it_does_not_need(root: Path, tmp_path: Path, python: Callable[..., str]):
    code = """
import sys, torch
before = set(sys.modules)
import ringattn
print(*set(sys.modules) - before)
"""
    loaded = python(code, cwd=tmp_path, search=root).split()
    assert "ringattn" in loaded
    assert not [name for name in loaded if name.partition(".")[0] in OPTIONAL or name.startswith("ringattn.launch")]
