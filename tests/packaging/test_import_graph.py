"""Who may import whom, read from the sources without running them.

    launch/  ->  ringattn/  ->  kernels/  ->  torch, triton, numpy

Besides, whatever is imported is declared in pyproject.toml, and goes by its installed name: `import kernels` would
work in a checkout only, and there load a second copy of `ringattn.kernels`.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.timeout(30)

STANDARD = tuple(sys.stdlib_module_names)
BROUGHT = ("cuda",)  # builds of torch for CUDA require cuda-bindings; others run without it


class Rule(NamedTuple):
    """What the modules of one folder may import: if `only` is given nothing else, and nothing in `never`."""

    package: str
    text: str
    never: tuple[str, ...]
    only: tuple[str, ...] | None = None


RULES = {
    "kernels": Rule(
        "ringattn.kernels",
        "kernels/ imports torch (never torch.distributed), triton, numpy, the standard library and its own modules",
        never=("torch.distributed",),
        only=("torch", "triton", "numpy", "ringattn.kernels", *STANDARD),
    ),
    "ringattn": Rule(
        "ringattn",
        "ringattn/ never imports hydra, omegaconf, ringattn.launch, ringattn.conf or tests",
        never=("hydra", "omegaconf", "ringattn.launch", "ringattn.conf", "kernels", "launch", "conf", "tests"),
    ),
    "launch": Rule(
        "ringattn.launch",
        "launch/ imports ringattn by that name, and no tests",
        never=("kernels", "launch", "conf", "tests"),
    ),
}


def within(module: str, packages: tuple[str, ...]) -> bool:
    """Whether the module is one of the packages or lies inside one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of each thing that a module directly inside `package` imports."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package.split(".")[: package.count(".") + 2 - level] if level else []
                base = ".".join([*above, *([module] if module else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):  # `import torch` is enough to use it
                yield node.lineno, "torch.distributed"


def violations(source: str, rule: Rule, package: str) -> Iterator[tuple[int, str]]:
    """(line, name) of each import in a module of `package` that breaks the rule."""
    for line, module in imported(source, package):
        if within(module, rule.never) or (rule.only is not None and not within(module, rule.only)):
            yield line, module


def sources(root: Path, folder: str) -> Iterator[tuple[Path, str]]:
    """(file, name of the package it is in) for each module of a folder; rglob does not follow the links."""
    files = sorted((root / folder).rglob("*.py"))
    assert files, f"{folder}/ holds no module"
    for path in files:
        yield path, ".".join([RULES[folder].package, *path.parent.relative_to(root / folder).parts])


@pytest.mark.parametrize("folder", RULES)
def test_each_folder_keeps_its_rule(root: Path, folder: str):
    rule = RULES[folder]
    broken = [
        f"{path.relative_to(root)}:{line} imports {module}"
        for path, package in sources(root, folder)
        for line, module in violations(path.read_text(), rule, package)
    ]
    assert not broken, "\n".join([rule.text, *broken])


def test_what_is_imported_is_declared(root: Path):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    provided_by = packages_distributions()
    missing = [
        f"{path.relative_to(root)}:{line} imports {module}"
        for folder in RULES
        for path, package in sources(root, folder)
        for line, module in imported(path.read_text(), package)
        if not within(module, ("ringattn", *BROUGHT, *STANDARD))
        and declared.isdisjoint(provided_by.get(module.partition(".")[0], ()))
    ]
    assert not missing, "\n".join(["pyproject.toml declares no dependency for these:", *missing])


@pytest.mark.parametrize(
    ("folder", "source", "broken"),
    [
        ("kernels", "import torch.distributed as dist", "torch.distributed"),
        ("kernels", "from torch import distributed", "torch.distributed"),
        ("kernels", "import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("kernels", "import ringattn.plan", "ringattn.plan"),
        ("kernels", "from ..plan import Plan", "ringattn.plan.Plan"),
        ("kernels", "from .. import plan", "ringattn.plan"),
        ("kernels", "import rich", "rich"),
        ("kernels", "from kernels import segments", "kernels.segments"),
        ("ringattn", "def late():\n    import hydra", "hydra"),
        ("ringattn", "from .launch import train", "ringattn.launch.train"),
        ("ringattn", "from . import conf", "ringattn.conf"),
        ("launch", "from kernels.segments import Segment", "kernels.segments.Segment"),
        ("launch", "import tests.oracle", "tests.oracle"),
    ],
)
def test_a_broken_rule_is_found(folder: str, source: str, broken: str):
    rule = RULES[folder]
    assert [module for _, module in violations(source, rule, rule.package)] == [broken]


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("kernels", "import math, torch, triton.language as tl\nfrom .segments import Segment"),
        ("ringattn", "import torch.distributed\nfrom .kernels import segments\nfrom . import mask"),
        ("launch", "import hydra\nfrom ringattn.kernels.segments import Segment\nfrom .data import Data"),
    ],
)
def test_a_kept_rule_is_not(folder: str, source: str):
    rule = RULES[folder]
    assert not list(violations(source, rule, rule.package))
