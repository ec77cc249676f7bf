"""The custom operators: torch's own operator checks, full-graph compilation, gradients of out and lse."""

import pytest
import torch

import ringattn
from ringattn.preparation import Settings
from ringattn.ranks import group_name
from tests.gang import run_ranks


def leaves(tokens: int = 6, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def operator_checks(rank: int, ranks: int) -> None:
    # q in another order of memory than the operators return: fakes must tell the real strides
    q, k, v = leaves()
    q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    group = group_name(None)
    settings = Settings(group, "zigzag", 6 * ranks, True, 0.3, "reference", "ring")
    sinks, cu_seqlens = torch.linspace(-1, 1, 4).double().requires_grad_(), torch.tensor([0, 5, 6 * ranks])
    for more in ((None, None), (sinks, cu_seqlens)):
        torch.library.opcheck(torch.ops.ringattn.forward.default, (q, k, v, *more, *settings))
        out, lse = torch.ops.ringattn.forward(q, k, v, *more, *settings)
        arguments = (None if x is None else x.detach() for x in (out, lse, q, k, v, out, lse, *more))
        torch.library.opcheck(torch.ops.ringattn.backward.default, (*arguments, *settings))


@pytest.mark.parametrize("ranks", [1, 2])
def test_torchs_operator_checks(ranks):
    run_ranks(ranks, operator_checks, ranks)


def compiled(rank: int) -> None:
    cp = ringattn.ContextParallel()

    def step(q, k, v):
        return cp.attention(q * 2, k, v, causal=True).square().sum()

    inputs = leaves()
    expected = torch.autograd.grad(step(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_compiles_to_one_graph():
    run_ranks(2, compiled)


def test_gradients_of_out_and_lse_are_numerically_right():
    cp = ringattn.ContextParallel(kernel="reference")
    assert torch.autograd.gradcheck(lambda *x: cp.attention(*x, causal=True, return_lse=True), leaves())


def test_a_gradient_that_a_kernel_cannot_give_raises():
    out, lse = ringattn.ring_attention(*leaves(), kernel="aten", return_lse=True)
    with pytest.raises(NotImplementedError, match="kernel='aten' cannot differentiate lse"):
        (out.sum() + lse.sum()).backward()
