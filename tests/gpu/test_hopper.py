"""The Hopper forward beside others: on some of the multiprocessors, and while keys are still arriving, when it waits
for flags, and says so when one does not come. And gradients: in the dtype that they leave in, and of documents that end
anywhere in a tile."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn.kernels.hopper import HopperKernel
from ringattn.kernels.interface import Arrival
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.segments import Segment, Segments
from ringattn.launch.oracle import error
from ringattn.plan import make_plan
from tests.gpu.test_triton import Piece, RoundedKernel, attend, poisoned

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
    pytest.mark.timeout(120),
]

SOURCES, SLOT, HEADS, FLAGS = 4, 1024, 16, 2
EPOCH = 7
SECOND = 10**9


@pytest.fixture(scope="module")
def forward():
    """Causal attention over keys from four sources, and error; takes flags [SOURCES - 1, FLAGS] and the patience."""
    from ringattn.kernels.hopper_forward_launch import forward as launch

    length = SOURCES * SLOT
    q = torch.randn(1, length, HEADS, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, length, 2 * FLAGS, 128, device="cuda", dtype=torch.bfloat16)
    segments = Segments([Segment(0, length, i * SLOT, SLOT, -i * SLOT) for i in range(SOURCES)])
    far_k, far_v = (x[:, SLOT:] for x in (k, v))
    own = k[:, :SLOT].contiguous(), v[:, :SLOT].contiguous()
    options = segments, 128**-0.5, None, torch.bfloat16

    def call(flags: Tensor, patience_ns: int) -> tuple[Tensor, Tensor, Tensor]:
        error = torch.zeros(1, dtype=torch.int32, device="cuda")
        epoch = torch.full_like(error, EPOCH)
        return *launch(q, *own, *options, Arrival(far_k, far_v, flags, epoch, SLOT, patience_ns, error)), error

    plain = launch(q, k, v, *options)
    out, lse, error = call(ready(), SECOND)
    assert torch.equal(out, plain[0])
    assert torch.equal(lse, plain[1])
    assert error.item() == 0
    return call


def ready(epoch: int = EPOCH) -> Tensor:
    return torch.full((SOURCES - 1, FLAGS), epoch, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("margin", [16, 131])
def test_room_for_others(margin):
    """On fewer multiprocessors: the same bits."""
    q = torch.randn(1, 4096, HEADS, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 4096, 2 * FLAGS, 128, device="cuda", dtype=torch.bfloat16)
    attend = partial(HopperKernel().forward, q, k, v, Segments([Segment(0, 4096, 0, 4096, 0)]), scale=0.1)
    assert all(torch.equal(x, y) for x, y in zip(attend(margin=margin), attend(), strict=True))


def test_flags_that_come_late(forward):
    expected = forward(ready(), SECOND)
    flags, there, copies = ready(EPOCH - 1), ready(EPOCH + 1).cpu().pin_memory(), torch.cuda.Stream()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with torch.cuda.stream(copies):
        torch.cuda._sleep(20_000_000)  # cycles; then a copy engine, which needs no multiprocessor, writes the flags
        flags.copy_(there, non_blocking=True)
    got = forward(flags, SECOND)
    torch.cuda.synchronize()
    assert time.perf_counter() - begin > 5e-3
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_a_flag_that_never_comes(forward):
    source, flag = 2, 1
    flags = ready()
    flags[source - 1, flag] -= 1
    out, lse, error = forward(flags, SECOND // 20)
    assert error.item() == 1 + (source - 1) * FLAGS + flag
    heads = slice(flag * HEADS // FLAGS, (flag + 1) * HEADS // FLAGS)
    assert out[:, source * SLOT :, heads].isnan().all()
    assert lse[:, heads, source * SLOT :].isnan().all()
    again = forward(ready(), SECOND)  # the context is alive
    assert again[0].isfinite().all()
    assert again[2].item() == 0


@pytest.mark.parametrize(
    ("heads", "groups", "d"), [(6, 2, 64), (8, 2, 64), (6, 2, 128), (8, 2, 128), (32, 1, 128), (8, 2, 16)]
)
def test_flags_whatever_heads_share_a_tile(heads, groups, d):
    """Two sequences, a window, rows that fill no tile, onto what is there: the bits of keys that are all there."""
    from ringattn.kernels.hopper_forward_launch import forward as launch

    rows, last = 1000, SOURCES - 1
    q, before = torch.randn(2, 2, rows, heads, d, device="cuda")
    k, v = torch.randn(2, 2, SOURCES * SLOT, groups, d, device="cuda", dtype=torch.bfloat16)
    lse, error = torch.randn(2, heads, rows, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    segments = Segments([Segment(0, rows, i * SLOT, SLOT, (last - i) * SLOT, 2500) for i in range(SOURCES)])
    near_k, near_v, far_k, far_v = k[:, :SLOT], v[:, :SLOT], k[:, SLOT:], v[:, SLOT:]
    flags = ready()[:, : min(groups, FLAGS)].contiguous()
    arrival = Arrival(far_k, far_v, flags, torch.full_like(error, EPOCH), SLOT, SECOND, error)

    def attend(k: Tensor, v: Tensor, arrival: Arrival | None) -> tuple[Tensor, Tensor]:
        running = before.clone(), lse.clone()
        return launch(q.bfloat16(), k, v, segments, 0.1, running, torch.float32, arrival)

    expected = attend(k, v, None)
    assert expected[0].isfinite().all()
    assert all(torch.equal(x, y) for x, y in zip(attend(near_k, near_v, arrival), expected, strict=True))
    assert error.item() == 0


@pytest.mark.parametrize("d", [64, 128])
def test_gradients_that_leave_at_once(d):
    """dk and dv in the dtype that they leave in: what rounding makes of the sums, bit by bit."""
    q, k, v, dout = torch.randn(4, 1, 700, 4, d, device="cuda", dtype=torch.bfloat16)
    segments, kernel = Segments([Segment(0, 700, 0, 700, 0)]), HopperKernel(deterministic=True)
    out, lse = kernel.forward(q, k, v, segments, scale=0.1)
    inputs = dout, q, k, v, out, lse, kernel.row_delta(dout, out), segments
    sums = kernel.backward(*inputs, scale=0.1)
    grads = kernel.backward(*inputs, scale=0.1, out_dtype=q.dtype)
    assert [x.dtype for x in grads] == [torch.float32, q.dtype, q.dtype]
    assert all(torch.equal(x.to(y.dtype), y) for x, y in zip(sums, grads, strict=True))


@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
@pytest.mark.parametrize("window", [None, 64, 192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_documents_that_end_anywhere(d, dtype, window, deterministic):
    """Tiles on a document's diagonal, where each half of the keys has a mask in one step and not in the other, and
    beside it; blocks of one step and of two, in turns of any kind."""
    bounds = [0, *accumulate((128, 64, 192, 1, 65, 320, 63, 129, 62, 256, 300))]
    plan = make_plan("contiguous", bounds[-1], 1, causal=True, window_size=window, cu_seqlens=bounds)
    q, dout = torch.randn(2, 1, bounds[-1], 4, d, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 1, bounds[-1], 2, d, device="cuda", dtype=dtype)
    segments = plan.segments(0, 0)
    oracle: Any = ReferenceKernel()
    baseline_kernel: Any = RoundedKernel()
    expected = attend(oracle, q.double(), dout.double(), [Piece(k.double(), v.double(), segments)], 0.1)
    baseline = attend(baseline_kernel, q, dout, [Piece(k, v, segments)], 0.1)
    with poisoned() if deterministic else nullcontext():
        got = attend(HopperKernel(), q, dout, [Piece(k, v, segments)], 0.1)
    for name, right in expected.items():
        allowed = 3 * error(baseline[name], right) + torch.finfo(torch.float32).eps
        assert error(got[name], right) <= allowed, name
