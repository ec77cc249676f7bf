"""What is particular to the Triton kernels, run by Triton's interpreter where there is no GPU. That they compute the
right thing over random segments is in `test_kernels.py`; here with every way of reading blocks and of running loops."""

import random
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from ringattn.kernels.interface import Part, nothing_seen, settled
from ringattn.kernels.portable import TritonKernel
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.segments import Segment, Segments
from ringattn.kernels.tuning import PASSES, TABLE, Tiling, tiling_for
from ringattn.launch.oracle import Inputs, attend
from tests.kernels.test_kernels import cut
from tests.tolerance import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = TritonKernel()

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

TILINGS = {
    "pointers": Tiling(16, 16, 4, 2),
    "descriptors": Tiling(32, 16, 4, 2, tma=True),
}


@pytest.fixture(params=TILINGS.values(), ids=list(TILINGS))
def tiling(request, monkeypatch):
    """Tiles so small that there are several."""
    from ringattn.kernels import triton_launch

    monkeypatch.setattr(triton_launch, "tiling_for", lambda *key: request.param)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(q_shape: tuple, k_shape: tuple, v_dim: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shapes = (q_shape, k_shape, (*k_shape[:3], v_dim), (*q_shape[:3], v_dim))
    return Inputs(*(torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes))


def check(inputs: Inputs, segments: Segments) -> None:
    expected = attend(ReferenceKernel(), Inputs(*(x.double() for x in inputs)), segments, 0.3)
    baseline = attend(ReferenceKernel(), inputs, segments, 0.3)
    assert_close(attend(KERNEL, inputs, segments, 0.3), expected, baseline)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_random_segments_over_several_tiles(tiling, dtype, seed):
    draw = random.Random(seed)
    rows, keys, d, e = draw.randint(20, 50), draw.randint(20, 50), draw.choice([16, 24]), draw.choice([16, 40])
    check(make_inputs((1, rows, 2, d), (1, keys, 1, d), e, dtype, seed), cut(rows, keys, draw))


def test_causal_with_whole_blocks(tiling):
    check(make_inputs((2, 64, 2, 16), (2, 64, 2, 16), 16, torch.float32), Segments([Segment(0, 64, 0, 64, 0)]))


def test_any_strides(tiling):
    q, k, v, dout = make_inputs((2, 20, 4, 16), (2, 20, 2, 16), 16, torch.float32)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # heads before rows, as some models have it
    k, v = torch.cat((k, v), -1).split(16, -1)  # one buffer for both
    dout = dout.mT.contiguous().mT  # last dimension not contiguous
    check(Inputs(q, k, v, dout), Segments([Segment(0, 20, 0, 20, 0)]))


def test_heads_and_sequences_that_share_memory(tiling):
    q, k, v, dout = make_inputs((1, 20, 4, 16), (1, 20, 1, 16), 16, torch.float32)
    q, dout = (x.expand(2, -1, -1, -1) for x in (q, dout))
    k, v = (x.expand(2, -1, 2, -1) for x in (k, v))
    check(Inputs(q, k, v, dout), Segments([Segment(0, 20, 0, 20, 0)]))


def test_what_lies_around_a_tensor_is_not_used(tiling):
    def surrounded(x: torch.Tensor) -> torch.Tensor:
        batch, length, heads, width = x.shape
        around = x.new_full((batch, length + 40, heads, width + 16), torch.nan)
        around[:, :length, :, :width] = x
        return around[:, :length, :, :width]

    inputs = make_inputs((1, 40, 2, 24), (1, 36, 2, 24), 24, torch.float32)
    check(Inputs(*map(surrounded, inputs)), Segments([Segment(0, 40, 0, 36, 36)]))


def test_wide_heads(tiling):
    check(make_inputs((1, 20, 1, 160), (1, 20, 1, 160), 136, torch.float32), Segments([Segment(0, 20, 0, 20, 0)]))


def test_descriptors_are_for_tensors_that_can_have_one():
    from ringattn.kernels.triton_arguments import strides, walked

    x = torch.zeros(2, 8, 4, 32, dtype=torch.float16)
    described: Any = walked(x, TILINGS["descriptors"], 16)
    assert described[0].shape == [2, 4, 8, 32]
    assert described[0].strides == [1024, 32, 128, 1]
    assert described[0].block_shape == [1, 1, 16, 32]
    assert described[1] is None
    single = x.as_strided((1, 8, 1, 32), (3, 128, 5, 1))  # strides of single heads and sequences mean nothing
    described = walked(single, TILINGS["descriptors"], 16)
    assert described[0].strides == [8, 8, 128, 1]
    assert strides(single) == (0, 128, 0)
    for other in (x[..., 1:], x.flatten()[: 8 * 4 * 12].view(1, 8, 4, 12), x[:, :, :1].expand(-1, -1, 3, -1)):
        block, steps = walked(other, TILINGS["descriptors"], 16)
        assert block is other
        assert steps == strides(other)
    assert walked(x, TILINGS["pointers"], 16)[0] is x


def test_tf32_only_where_torch_uses_it():
    from ringattn.kernels.triton_launch import precision

    assert precision(torch.float32) == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert precision(torch.float32) == "tf32"
        assert precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_heads_in_sections(tiling, monkeypatch):
    from ringattn.kernels import triton_launch

    assert [triton_launch.section(8, 12 << 20), triton_launch.section(8, 40 << 20)] == [2, 1]
    monkeypatch.setattr(triton_launch, "section", lambda units, bytes_each: units // 2)
    check(make_inputs((2, 20, 4, 16), (2, 20, 2, 16), 16, torch.float32), Segments([Segment(0, 20, 0, 20, 0)]))


def test_pieces_merge_into_the_whole(tiling):
    inputs = make_inputs((1, 40, 2, 16), (1, 40, 1, 16), 16, torch.float16)
    q, k, v, _ = inputs
    whole = cut(40, 40, random.Random(3))
    out, lse = ReferenceKernel().forward(q.double(), k.double(), v.double(), whole, scale=0.3)
    running = None
    for i, segment in enumerate(whole):
        dtype = torch.float16 if i == len(whole) - 1 else None
        running = KERNEL.forward(q, k, v, Segments([segment]), scale=0.3, running=running, out_dtype=dtype)
    assert running is not None
    assert running[0].dtype == torch.float16
    torch.testing.assert_close(running[0].double(), out, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(running[1].double(), lse, rtol=1e-3, atol=1e-3)


def test_a_running_result_is_merged_in_place(tiling):
    q, k, v, _ = make_inputs((1, 40, 2, 16), (1, 40, 1, 16), 16, torch.float32)
    running = nothing_seen(q, v)
    segments = Segments([Segment(20, 20, 0, 10, 10)])
    out, lse = KERNEL.forward(q, k, v, segments, scale=0.3, running=running)
    assert out is running[0]
    assert lse is running[1]
    expected = ReferenceKernel().forward(q, k, v, segments, scale=0.3)
    torch.testing.assert_close((out, lse), expected)


@pytest.mark.parametrize("given", ["dk", "dv"])
def test_one_sum_of_two_is_given(tiling, given):
    q, k, v, dout = make_inputs((1, 20, 2, 16), (1, 20, 2, 16), 16, torch.float32)
    segments = Segments([Segment(0, 20, 0, 20, 0)])
    out, lse = KERNEL.forward(q, k, v, segments, scale=0.3)
    lse, delta = (x.mT.contiguous().mT for x in (lse, KERNEL.row_delta(dout, out)))  # rows before heads
    expected = dict(
        zip(("dq", "dk", "dv"), KERNEL.backward(dout, q, k, v, out, lse, delta, segments, scale=0.3), strict=True)
    )
    total: dict[str, Any] = {given: torch.ones_like(expected[given])}
    got = KERNEL.backward(dout, q, k, v, out, lse, delta, segments, scale=0.3, **total)
    expected[given] += 1
    torch.testing.assert_close(dict(zip(("dq", "dk", "dv"), got, strict=True)), expected)
    reference = ReferenceKernel().backward(dout, q, k, v, out, lse, delta, segments, scale=0.3)
    torch.testing.assert_close(got[0], reference[0])


def test_nothing_to_see(tiling):
    inputs = make_inputs((1, 24, 2, 16), (1, 24, 2, 16), 16, torch.float32)
    for segments in (Segments(), Segments([Segment(0, 4, 0, 4, -4)]), Segments([Segment(18, 2, 5, 1, 0)])):
        check(inputs, segments)
    q, k, v, _ = inputs
    out, lse = KERNEL.forward(q, k, v, Segments([Segment(18, 2, 5, 1, 0)]), scale=0.3, out_dtype=torch.bfloat16)
    assert (out[:, :18] == 0).all()
    assert (lse[:, :, :18] == -torch.inf).all()
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "keys"), [(0, 8), (8, 0), (0, 0)])
def test_empty_shards(rows, keys):
    q, k, v, dout = make_inputs((1, rows, 2, 16), (1, keys, 2, 16), 16, torch.float32)
    out, lse = KERNEL.forward(q, k, v, Segments(), scale=0.3)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    grads = KERNEL.backward(dout, q, k, v, out, lse, KERNEL.row_delta(dout, out), Segments(), scale=0.3)
    assert all((grad == 0).all() for grad in grads)


def test_bit_equal_from_run_to_run(tiling):
    inputs = make_inputs((1, 40, 4, 16), (1, 40, 2, 16), 16, torch.float16)
    segments = Segments([Segment(0, 40, 0, 40, 0)])
    first, second = (attend(KERNEL, inputs, segments, 0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cut", [0, 9, None])
@pytest.mark.parametrize("stretches", [(), ((0, 21), (3, 11), (20, 21), (5, 5))], ids=str)
def test_gradients_are_added_up_rounded_and_contiguous(stretches, cut, dtype):
    """Own ones in two halves, the later one first, or as a part of more, and what others have to add, in the same order
    as without Triton."""

    def part(start: int, stop: int, more: int = 0) -> Part:
        grads = (torch.randn(2, stop - start + more, 3, d, device=DEVICE) for d in (80, 48))
        return Part(slice(start, stop), *(x[:, : stop - start] for x in grads))

    dq = torch.randn(2, 6, 37, 80, device=DEVICE).transpose(1, 2)  # heads before rows
    own = [part(cut, 21), part(0, cut)] if cut else [part(0, 21, more=0 if cut == 0 else 13)]
    parts = [part(*stretch, more=index % 3) for index, stretch in enumerate(stretches)]
    into = tuple(
        torch.empty(2, length, heads, d, dtype=dtype, device=DEVICE)
        for length, heads, d in ((37, 6, 80), (21, 3, 80), (21, 3, 48))
    )
    for where in (None, into):
        got = KERNEL.settled(dq, own, parts, dtype, where)
        expected = settled(dq, [Part(keys, dk.clone(), dv.clone()) for keys, dk, dv in own], parts, dtype)
        assert all(x.is_contiguous() for x in got)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_refusals_say_why():
    x = torch.zeros(1, 4, 2, 16, device=DEVICE)
    assert "not torch.float64" in (KERNEL.refuses(*3 * [x.double()]) or "")
    wide = x.new_zeros(1, 4, 2, 264)
    assert "head dims go up to 256, got 264" in (KERNEL.refuses(wide, wide, x) or "")
    with pytest.raises(ValueError, match="scale must be positive"):
        KERNEL.forward(x, x, x, Segments([Segment(0, 4, 0, 4, 0)]), scale=0.0)


def test_every_input_has_a_tiling():
    for family in ("sm_80", "sm_86", "sm_90", "sm_100", "other"):
        for name in PASSES:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for head_dim in (1, 32, 80, 96, 128, 192, 256):
                    tiling = tiling_for(name, family, dtype, head_dim, 1000)
                    assert tiling in TABLE.values()
                    assert not (tiling.tma and family in ("sm_80", "sm_86", "other"))
