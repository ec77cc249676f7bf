"""The folders kernels/ and launch/ never stand in for other people's packages of those names.

`python -c`, `-m` and `-m pytest` look into the working directory first, and in a checkout that holds a folder called
kernels. Without an `__init__.py` it is at most a namespace, and a regular package anywhere on the path, such as
Hugging Face's `kernels`, goes before it. With one, `import transformers` would break.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(30)

NAMES = pytest.mark.parametrize("name", ["kernels", "launch"])


@NAMES
def test_no_regular_package_in_the_checkout(name: str, root: Path, python: Callable[..., str]):
    code = f"import importlib.util; spec = importlib.util.find_spec({name!r}); print(spec and spec.origin)"
    origin = python(code, cwd=root)
    assert origin == "None" or not Path(origin).is_relative_to(root), f"{origin} hides every other package {name!r}"


@NAMES
def test_a_package_later_on_the_path_wins(name: str, root: Path, tmp_path: Path, python: Callable[..., str]):
    theirs = tmp_path / name / "__init__.py"
    theirs.parent.mkdir()
    theirs.write_text("def get_kernel(): ...\n")
    code = f"import sys, {name}; assert sys.path[0] == '', sys.path; print({name}.__file__, {name}.get_kernel.__name__)"
    assert python(code, cwd=root, search=tmp_path) == f"{theirs} get_kernel"
