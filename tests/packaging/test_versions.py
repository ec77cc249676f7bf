"""Versions that are written down twice agree."""

from __future__ import annotations

import re
from pathlib import Path

import ringattn


def first(pattern: str, path: Path) -> str:
    """The group of the pattern's first match in a file, as a line of its own."""
    match = re.search(rf"^{pattern}$", path.read_text(), re.MULTILINE)
    assert match, f"{path.name} has no line like {pattern}"
    return match[1]


def test_changelog_opens_with_the_version(root: Path):
    assert first(r"## \[(\d.*?)\].*", root / "CHANGELOG.md") == ringattn.__version__


def test_pre_commit_runs_the_ruff_that_make_lint_runs(root: Path):
    hook = first(r".*/ruff-pre-commit\n +rev: v(.*)", root / ".pre-commit-config.yaml")
    assert hook == first(r"ruff==(.*)", root / "constraints.txt")
