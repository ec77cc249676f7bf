"""Wheel and sdist hold the package, all of it and nothing else, with real files where the checkout has links."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def package(root: Path) -> set[str]:
    """Paths of the files that make up the package, seen through the links."""
    found = set()
    for folder, _, names in os.walk(root / "ringattn", followlinks=True):
        files = (Path(folder, name) for name in names)
        found |= {str(path.relative_to(root)) for path in files if path.suffix != ".pyc"}
    return found


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("ringattn-*-py3-none-any.whl")
    return path


def test_the_package_has_every_room(package: set[str]):
    assert {"ringattn/py.typed", "ringattn/conf/__init__.py", "ringattn/kernels/segments.py"} <= package
    assert any(path.startswith("ringattn/launch/") and path.endswith(".py") for path in package)
    assert any(path.startswith("ringattn/conf/") and path.endswith(".yaml") for path in package)


def test_wheel_contents(wheel: Path, package: set[str]):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == package


def test_sdist_contents(distributions: Path, package: set[str]):
    (path,) = distributions.glob("ringattn-*.tar.gz")
    with tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    links = [member.name for member in members if not member.isfile()]
    assert not links, f"links in an sdist lead nowhere: {links}"
    names = {member.name.partition("/")[2] for member in members}
    about = {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "setup.cfg"}
    assert {name for name in names if not name.startswith("ringattn.egg-info/")} == package | about


def test_an_installed_wheel_imports(wheel: Path, tmp_path: Path, python: Callable[..., str]):
    site, neutral = tmp_path / "site", tmp_path / "elsewhere"
    neutral.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True)
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"ringattn"}
    code = """
import ringattn, ringattn.conf, ringattn.kernels.segments, ringattn.launch
for module in (ringattn, ringattn.conf, ringattn.kernels, ringattn.kernels.segments, ringattn.launch):
    print(*module.__spec__.submodule_search_locations or [module.__file__], sep="\\n")
"""
    places = python(code, cwd=neutral, search=site).splitlines()
    assert len(places) == 5
    assert all(Path(place).is_relative_to(site) for place in places), places
