"""What is bound, and what is started as it was bound before. No GPU and no Triton: kernels are played."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from ringattn.kernels import launching


class Compiled:
    def __init__(self, started: list):
        self.started = started

    def __getitem__(self, grid):
        return lambda *arguments: self.started.append((grid, arguments))


class Played:
    """A kernel of Triton's: bound, it returns what it compiled; started, that notes with what."""

    def __init__(self, unspecialised: tuple[str, ...] = ("N",)):
        self.bound: list = []
        self.started: list = []
        self.do_not_specialize = unspecialised
        self.fn = lambda x, N, steps, WIDE, FLAG: None
        self.signature = inspect.signature(self.fn)

    def __getitem__(self, grid):
        def bind(*arguments: Any, **named: Any) -> Compiled:
            self.bound.append((grid, arguments, named))
            return Compiled(self.started)

        return bind


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(launching, "kept", {})


HERE = torch.device("cpu")
CONSTANTS = (("num_warps", 4), ("FLAG", True))
MEMORY = torch.zeros(64)


def start(kernel: Played, x: Any = MEMORY, n: int = 5, steps: Any = (1,), constants: Any = CONSTANTS, wide: int = 2):
    launching.launch(kernel, HERE, (7, 1, 1), (x, n), (steps,), constants, WIDE=wide)


def test_bound_once_and_then_started_with_everything_in_its_place():
    kernel, other = Played(), torch.ones(8)
    start(kernel)
    start(kernel, other, n=6)
    assert kernel.bound == [((7, 1, 1), (MEMORY, 5, (1,)), {"num_warps": 4, "FLAG": True, "WIDE": 2})]
    ((grid, arguments),) = kernel.started
    assert grid == (7, 1, 1)
    assert arguments[0] is other
    assert arguments[1:] == (6, (1,), 2, True)


class Form:
    form = object()


CHANGES = {
    "dtype": {"x": MEMORY.double()},
    "alignment": {"x": MEMORY[1:]},
    "nothing": {"x": None},
    "descriptor": {"x": Form()},
    "64 bits": {"n": 1 << 31},
    "strides": {"steps": (16,)},
    "no strides": {"steps": None},
    "option": {"constants": (("num_warps", 8), ("FLAG", True))},
    "constant": {"constants": (("num_warps", 4), ("FLAG", False))},
    "another constant": {"wide": 3},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_whatever_another_variant_may_follow_from_is_bound_anew(change):
    kernel = Played()
    start(kernel)
    start(kernel, **change)
    start(kernel, **change)
    assert len(kernel.bound) == 2
    assert len(kernel.started) == 1


def test_another_kernel_is_bound_for_itself():
    kernels = Played(), Played()
    for kernel in kernels * 2:
        start(kernel)
    assert [(len(kernel.bound), len(kernel.started)) for kernel in kernels] == [(1, 1), (1, 1)]


def test_what_must_not_be_kept(monkeypatch):
    kernel = Played(unspecialised=())
    with pytest.raises(AssertionError, match="specialised on"):
        start(kernel)
    kernel = Played()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    start(kernel)
    start(kernel)
    assert len(kernel.bound) == 2


def test_only_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(launching, "KEPT", 3)
    kernel = Played()
    for wide in range(8):
        start(kernel, wide=wide)
    assert 0 < len(launching.kept) <= 3
    launching.launch(kernel, HERE, (0, 1, 1), (MEMORY, 5), ((1,),), CONSTANTS, WIDE=9)
    assert len(kernel.bound) == 8  # a grid of nothing is not started
