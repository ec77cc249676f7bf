"""The Hopper backward while keys arrive: it waits for flags, says so when one does not come, and stores gradients of
these keys where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn.kernels.hopper import HopperKernel
from ringattn.kernels.interface import Arrival
from ringattn.kernels.segments import Segment, Segments
from ringattn.launch.oracle import error

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
    pytest.mark.timeout(120),
]

SOURCES, SLOT, OWN, LAST = 3, 1024, 900, 700  # keys of a slot, and those in the first and in the last
EPOCH, SECOND = 7, 10**9
SHAPES = [(1, 8, 2, 128), (2, 8, 8, 64), (1, 8, 2, 16), (2, 3, 1, 80)]


class Attention:
    """Rows that see keys of several sources, some of them only within a window, and their gradients."""

    def __init__(self, shape: tuple[int, int, int, int], deterministic: bool):
        batch, heads, groups, d = shape
        self.flags = max(1, groups // 2)
        self.length = (SOURCES - 1) * SLOT + LAST
        generator = torch.Generator("cuda").manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device="cuda", generator=generator).bfloat16()

        self.q, self.dout = random(OWN, heads, d), random(OWN, heads, d)
        self.k, self.v = random(self.length, groups, d), random(self.length, groups, d)
        for x in (self.k, self.v):
            x[:, OWN:SLOT] = 0
        ends = OWN, SLOT, LAST
        windows = 1 << 30, 300, 500
        self.segments = Segments(
            [Segment(0, OWN, i * SLOT, ends[i], (0, 0, 600)[i], windows[i]) for i in range(SOURCES)]
        )
        self.kernel: Any = HopperKernel(deterministic)
        self.out, self.lse = self.kernel.forward(self.q, self.k, self.v, self.segments, scale=0.1)
        self.out = self.out.bfloat16()
        self.homes = [torch.empty(2, batch, n, groups, d, device="cuda") for n in (SLOT, LAST)]
        self.error = torch.zeros(1, dtype=torch.int32, device="cuda")

    def begun(self) -> tuple[tuple, dict]:
        """What a launch is given besides keys."""
        begun = self.kernel.begin(self.dout, self.q, self.v, self.out, self.lse, None, scale=0.1)
        return (self.out, self.lse, None, self.segments), {"scale": 0.1, **begun}

    def plain(self) -> tuple[Tensor, ...]:
        """All keys are there."""
        more, options = self.begun()
        return self.kernel.backward(self.dout, self.q, self.k, self.v, *more, **options)

    def waiting(self, flags: Tensor, patience: int = SECOND) -> tuple[Tensor, ...]:
        """dq, and dk and dv of own keys and, from `homes`, the others'."""
        for x in self.homes:
            x.fill_(torch.nan)
        k, v, far_k, far_v = (
            x[:, keys].contiguous() for keys in (slice(OWN), slice(SLOT, None)) for x in (self.k, self.v)
        )
        epoch = torch.full_like(self.error, EPOCH)
        more, options = self.begun()
        arrival = Arrival(far_k, far_v, flags, epoch, SLOT, patience, self.error.zero_())
        more = self.dout, self.q, k, v, *more
        dq, *own = self.kernel.backward(*more, **options, arrival=arrival, homes=self.homes)
        return dq, *(torch.cat(x, 1) for x in zip(own, *self.homes, strict=True))

    def ready(self, epoch: int = EPOCH) -> Tensor:
        return torch.full((SOURCES - 1, self.flags), epoch, dtype=torch.int32, device="cuda")


def seen(x: Tensor) -> Tensor:
    """Gradients of keys, without what lies between own ones and the others'."""
    return torch.cat((x[:, :OWN], x[:, SLOT:]), 1)


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """dk and dv bit by bit; tiles may have added to dq in another order."""
    assert error(got[0], expected[0].double()) < 1e-6
    assert all(torch.equal(x, seen(y)) for x, y in zip(got[1:], expected[1:], strict=True))


@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keys_that_are_there(shape, deterministic):
    """Again and again."""
    attention = Attention(shape, deterministic)
    expected = attention.plain()
    first = attention.waiting(attention.ready())
    for _ in range(20):
        got = attention.waiting(attention.ready())
        assert_same(got, expected)
        assert attention.error.item() == 0
        assert torch.equal(got[0], first[0]) or not deterministic


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keys_that_come_late(shape):
    attention = Attention(shape, False)
    expected = attention.plain()
    flags, there, copies = attention.ready(EPOCH - 1), attention.ready().cpu().pin_memory(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(copies):
        torch.cuda._sleep(20_000_000)  # cycles; then a copy engine, which needs no multiprocessor, writes the flags
        flags.copy_(there, non_blocking=True)
    assert_same(attention.waiting(flags), expected)


@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_keys_that_never_come(shape, deterministic):
    """What follows from them is NaN, and the context is alive."""
    attention = Attention(shape, deterministic)
    source, flag = 2, attention.flags - 1
    flags = attention.ready()
    flags[source - 1, flag] -= 1
    dq, dk, dv = attention.waiting(flags, SECOND // 20)
    assert attention.error.item() == 1 + (source - 1) * attention.flags + flag
    late = slice(flag * dk.shape[2] // attention.flags, None)
    for x in (dk, dv):
        assert x[:, OWN + (source - 1) * SLOT + 101 :, late].isnan().all()  # the first key that anybody sees
        assert x[:, :OWN].isfinite().all()
    queries = slice(late.start * dq.shape[2] // dk.shape[2], None)
    assert dq[:, :599, queries].isnan().any(-1).all()  # rows that see keys of this source
    assert_same(attention.waiting(attention.ready()), attention.plain())
