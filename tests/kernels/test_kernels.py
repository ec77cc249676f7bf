"""Every kernel that runs here against the specification, over random lists of segments."""

import itertools
import os
import random

import pytest
import torch

from ringattn.kernels.interface import Capped
from ringattn.kernels.reference import ReferenceKernel
from ringattn.kernels.registry import KERNELS, choose_kernel
from ringattn.kernels.segments import NO_WINDOW, Segment, Segments
from ringattn.launch.oracle import Case, Inputs, attend, make_inputs
from tests.tolerance import assert_close

CPU = [name for name, kernel in KERNELS.items() if not kernel.refuses(*torch.zeros(3, 1, 1, 1, 8))]
DTYPES: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(
    CPU, (torch.float64, torch.float32, torch.float16, torch.bfloat16)
)
if os.environ.get("TRITON_INTERPRET") == "1":  # see conftest.py; the interpreter truncates bfloat16, tests/gpu has it
    DTYPES["triton"] = (torch.float32, torch.float16)


def cut(rows: int, keys: int, draw: random.Random) -> Segments:
    """A grid of segments that do not overlap, some of them missing, each with an offset and half with a window of its
    own, shuffled."""
    row_cuts = sorted({0, rows, *draw.sample(range(rows), min(rows, 2))})
    key_cuts = sorted({0, keys, *draw.sample(range(keys), min(keys, 2))})
    grid = [
        Segment(q0, q1 - q0, k0, k1 - k0, draw.randint(-(q1 - q0), k1 - k0))
        for q0, q1 in itertools.pairwise(row_cuts)
        for k0, k1 in itertools.pairwise(key_cuts)
        if draw.random() < 0.8
    ]
    draw.shuffle(grid)
    return Segments(segment._replace(window=draw.choice([NO_WINDOW, draw.randint(0, 30)])) for segment in grid)


def against_the_specification(kernel: str, dtype: torch.dtype, seed: int, softcap: float = 0.0) -> None:
    draw = random.Random(seed)
    rows, keys = draw.randint(1, 40), draw.randint(1, 40)
    q_heads, kv_heads = draw.choice([(4, 4), (4, 2), (4, 1)])
    case = Case(rows, draw.randint(1, 2), q_heads, kv_heads, dtype=dtype)
    q, _, _, dout = make_inputs(case, seed)
    _, k, v, _ = make_inputs(case._replace(seq_len=keys), seed + 1)
    inputs = Inputs(q, k, v, dout)
    segments = cut(rows, keys, draw)
    specification, tried = ReferenceKernel(), KERNELS[kernel]
    if softcap:
        specification, tried = Capped(specification, softcap), Capped(tried, softcap)
    expected = attend(specification, Inputs(*(x.double() for x in inputs)), segments, 0.3)
    baseline = attend(specification, inputs, segments, 0.3)
    got = attend(tried, inputs, segments, 0.3)
    assert_close(got, expected, baseline)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in DTYPES for dtype in DTYPES[name]], ids=str)
def test_random_segments(name, dtype, seed):
    against_the_specification(name, dtype, seed)


CAPPING = [(name, dtype) for name in DTYPES for dtype in DTYPES[name] if KERNELS[name].caps_scores]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("name", "dtype"), CAPPING, ids=str)
def test_capped_scores(name, dtype, seed):
    against_the_specification(name, dtype, seed, softcap=(0.3, 2.0, 50.0)[seed % 3])


def test_a_kernel_that_does_not_cap_scores_is_passed_over():
    q, k, v = torch.zeros(3, 1, 4, 2, 8)
    choice = choose_kernel("auto", q, k, v, softcap=30.0)
    assert choice.kernel.name == "reference"
    assert "aten refused: it does not cap scores" in choice.reason
    with pytest.raises(NotImplementedError, match="kernel='aten' cannot take these inputs: it does not cap scores"):
        choose_kernel("aten", q, k, v, softcap=30.0)
    with pytest.raises(NotImplementedError, match="kernel='aten' does not cap scores; use kernel='auto'"):
        Capped(KERNELS["aten"], 30.0)


@pytest.mark.parametrize("name", DTYPES)
def test_a_row_that_sees_nothing_gets_zero(name):
    q, k, v, dout = make_inputs(Case(6, dtype=torch.float32), seed=0)
    segments = Segments([Segment(2, 2, 0, 6, 5)])
    out, lse = KERNELS[name].forward(q, k, v, segments, scale=0.5)
    blind = [0, 1, 4, 5]
    assert (out[:, blind] == 0).all()
    assert (lse[:, :, blind] == -torch.inf).all()
    grads = KERNELS[name].backward(dout, q, k, v, out, lse, KERNELS[name].row_delta(dout, out), segments, scale=0.5)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, blind] == 0).all()


@pytest.mark.parametrize("name", DTYPES)
def test_gradients_add_to_what_is_there(name):
    q, k, v, dout = make_inputs(Case(6, dtype=torch.float32), seed=0)
    segments = Segments([Segment(0, 6, 0, 6, 0)])
    out, lse = KERNELS[name].forward(q, k, v, segments, scale=0.5)
    arguments = (dout, q, k, v, out, lse, KERNELS[name].row_delta(dout, out), segments)
    fresh = KERNELS[name].backward(*arguments, scale=0.5)
    totals = tuple(torch.ones_like(x) for x in fresh)
    added = KERNELS[name].backward(*arguments, scale=0.5, dq=totals[0], dk=totals[1], dv=totals[2])
    for total, result, part in zip(totals, added, fresh, strict=True):
        assert result is total
        torch.testing.assert_close(result, part + 1)


def test_an_explicit_kernel_never_falls_back():
    q, k, v = torch.zeros(3, 1, 4, 2, 8)
    assert choose_kernel("auto", q, k, v).kernel.name == "aten"
    with pytest.raises(NotImplementedError, match="kernel='cudnn' cannot take these inputs: cuDNN runs on CUDA"):
        choose_kernel("cudnn", q, k, v)
    with pytest.raises(NotImplementedError, match="head dims differ"):
        choose_kernel("aten", q, k, v[..., :4])
    choice = choose_kernel("auto", q, k, v[..., :4])
    assert choice.kernel.name == "reference"
    assert "aten refused: head dims differ" in choice.reason
    with pytest.raises(ValueError, match="got kernel='flash'; choose one of auto"):
        choose_kernel("flash", q, k, v)
