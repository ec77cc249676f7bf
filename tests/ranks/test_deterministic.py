"""`deterministic` goes from the call through every executor to the kernel, whatever torch is told meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ringattn
from ringattn.kernels.aten import AtenKernel
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.registry import KERNELS, choose_kernel
from tests.gang import run_ranks


class Told(ReferenceKernel):
    """A kernel that sums in a fixed order if it is told to, and notes what it was told."""

    name = "told"
    ran: list[bool | None] = []  # noqa: RUF012

    def __init__(self, deterministic: bool | None = None):
        self.deterministic = deterministic

    def ordered(self, deterministic: bool) -> Told:
        return Told(deterministic)

    def backward(self, *arguments, **options):
        self.ran.append(self.deterministic)
        return super().backward(*arguments, **options)


def differentiate(cp: ringattn.ContextParallel, **options) -> None:
    q, k, v = (torch.ones(1, 4, heads, 8, requires_grad=True) for heads in (2, 1, 1))
    cp.attention(q, k, v, causal=True, **options).sum().backward()


def told(rank: int, executor: str, given: bool | None, torchs: bool) -> None:
    KERNELS["told"] = Told()
    torch.use_deterministic_algorithms(torchs)
    cp = ringattn.ContextParallel(kernel="told", executor=executor, deterministic=given)
    for options in ({}, {"softcap": 5.0}):
        Told.ran.clear()
        differentiate(cp, **options)
        assert set(Told.ran) == {torchs if given is None else given}, Told.ran


@pytest.mark.parametrize("given", [None, False, True])
@pytest.mark.parametrize("torchs", [False, True])
@pytest.mark.parametrize("executor", ["ring", "gather"])
def test_every_executor_runs_the_kernel_that_was_told(executor, given, torchs):
    run_ranks(2, told, executor, given, torchs)


@pytest.mark.parametrize("given", [None, False, True])
@pytest.mark.parametrize("torchs", [False, True])
def test_the_hopper_kernel_says_so_to_its_launch(monkeypatch, given, torchs):
    launch = pytest.importorskip("ringattn.kernels.hopper_backward_launch")
    from ringattn.kernels.hopper import HopperKernel
    from ringattn.kernels.segments import Segment, Segments

    calls = []
    monkeypatch.setattr(launch, "backward", lambda *arguments: calls.append(arguments[11:13]))
    monkeypatch.setattr(HopperKernel, "refuses", lambda *_: None)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: torchs)
    q, k, v = (torch.ones(1, 4, heads, 64, dtype=torch.bfloat16) for heads in (2, 1, 1))
    kernel = choose_kernel("hopper", q, k, v, deterministic=given).kernel
    lse = torch.zeros(1, 2, 4)
    kernel.backward(q, q, k, v, q, lse, lse, Segments([Segment(0, 4, 0, 4, 0)]), scale=1.0, out_dtype=q.dtype)
    in_order = torchs if given is None else given
    assert calls == [(in_order, q.dtype)]


def test_torchs_own_kernels_follow_torch_only(monkeypatch):
    monkeypatch.setattr(AtenKernel, "refuses", lambda *_: None)
    on_a_gpu: Any = [SimpleNamespace(is_cuda=True, device=torch.device("cuda"))] * 3
    with pytest.raises(NotImplementedError, match=r"its gradients are sums in any order, unless torch.use_determ"):
        choose_kernel("aten", *on_a_gpu, deterministic=True)
    choose_kernel("aten", *on_a_gpu, deterministic=False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    choose_kernel("aten", *on_a_gpu, deterministic=True)
