"""The public face on real ranks over gloo: outputs and gradients against fp64 on one rank."""

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint, noop_context_fn

import ringattn
from ringattn.kernels.registry import choose_kernel
from ringattn.launch.oracle import Case, Result, attend_across_ranks, attend_on_one_rank, exact, make_inputs
from ringattn.layout import LAYOUTS
from ringattn.ranks import group_name, ranks_named
from tests.gang import run_ranks
from tests.tolerance import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = list(itertools.product(LAYOUTS, [(4, 4), (4, 1), (8, 2)], (True, False), (331, 96, 7, 2), (1, 3), DTYPES))


def check_cases(rank: int, cases: list, device: str = "cpu", executor: str = "auto") -> None:
    for layout, (q_heads, kv_heads), causal, seq_len, batch, dtype in cases:
        check_case(rank, Case(seq_len, batch, q_heads, kv_heads, 16, causal, dtype), layout, device, executor)


def check_case(rank: int, case: Case, layout: str, device: str, executor: str) -> None:
    """Output and gradients against fp64, on rank 0."""
    inputs = make_inputs(case, case.seq_len, device)
    cp = ringattn.ContextParallel(layout=layout, executor=executor)
    got = attend_across_ranks(cp, case, inputs)
    if rank == 0:
        kernel = choose_kernel(cp.kernel, *inputs[:3]).kernel
        assert_close(got, exact(case, inputs), attend_on_one_rank(kernel, case, inputs))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_equal_to_one_rank(ranks):
    """A random sample of all layouts, heads, masks, lengths, batches and dtypes; tests/simulated runs every one."""
    run_ranks(ranks, check_cases, random.Random(ranks).sample(CASES, 40))


@pytest.mark.parametrize("ranks", [2, 3])
def test_gather_is_equal_to_one_rank(ranks):
    run_ranks(ranks, check_cases, random.Random(ranks).sample(CASES, 20), "cpu", "gather")


def pull_without_gpus(rank: int) -> None:
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match="executor='pull' needs ranks on one node whose GPUs"):
        ringattn.ring_attention(q, q, q, executor="pull")
    with pytest.raises(ValueError, match="got executor='push'; choose one of auto, ring, gather, pull"):
        ringattn.ring_attention(q, q, q, executor="push")


def test_an_executor_that_cannot_run_here_raises():
    run_ranks(2, pull_without_gpus)


def shard_anything(rank: int) -> None:
    for layout, (shape, dim) in itertools.product(LAYOUTS, [((10,), 0), ((2, 7), 1), ((3, 1, 4), -1), ((2, 2), 0)]):
        cp = ringattn.ContextParallel(layout=layout)
        x = torch.randint(100, shape)
        dist.broadcast(x, 0)
        part = cp.shard(x, dim)
        assert part.shape[dim] == len(cp.positions(shape[dim]))
        assert torch.equal(cp.unshard(part, dim, seq_len=shape[dim]), x)
        assert torch.equal(cp.shard(torch.arange(shape[dim]), 0), cp.positions(shape[dim]))


def test_shard_and_unshard_any_tensor():
    run_ranks(3, shard_anything)


def unshard_gradient(rank: int) -> list[float]:
    cp = ringattn.ContextParallel(layout="contiguous")
    x = torch.ones(2 if rank == 0 else 1, requires_grad=True)
    (cp.unshard(x, 0, seq_len=3).sum() * (rank + 1)).backward()
    with pytest.raises(ValueError, match="pass the seq_len that was sharded"):
        cp.unshard(x, 0, seq_len=9)
    assert x.grad is not None
    return x.grad.tolist()


def test_the_gradient_of_unshard_sums_over_ranks():
    assert run_ranks(2, unshard_gradient) == [[3, 3], [3]]


def attend_in_subgroups(rank: int) -> None:
    """Two meshes of two ranks each, side by side, on different sequences."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    with pytest.raises(ValueError, match=r"pass one that shares a sequence: mesh\['context'\]"):
        ringattn.ContextParallel(mesh)
    for group in (mesh["context"], mesh["context"].get_group()):
        cp = ringattn.ContextParallel(group)
        assert (cp.size, cp.rank) == (2, rank % 2)
        case = Case(13, 1, 4, 2)
        inputs = make_inputs(case, seed=rank // 2)
        assert_close(attend_across_ranks(cp, case, inputs), exact(case, inputs), exact(case, inputs))


def test_groups_and_meshes():
    run_ranks(4, attend_in_subgroups)


def recompute(rank: int) -> None:
    """Plain checkpointing runs the forward ring again, on every rank alike; keeping (out, lse) does not."""
    cp = ringattn.ContextParallel()
    q, k, v = (torch.randn(1, 6, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def block(q, k, v):
        return cp.attention(q * 2, k, v, causal=True).square().sum()

    expected = torch.autograd.grad(block(q, k, v), (q, k, v))
    for context, rings in ((noop_context_fn, 3), (ringattn.keep_attention, 2)):
        before = ranks_named(group_name(None)).calls
        loss = checkpoint(block, q, k, v, use_reentrant=False, context_fn=context)
        got = torch.autograd.grad(loss, (q, k, v))
        assert ranks_named(group_name(None)).calls - before == rings
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_activation_checkpointing():
    run_ranks(2, recompute)


def many_shapes(rank: int) -> None:
    """Buffers grow and are reused: a small call after a large one, and two calls before their backwards."""
    cp = ringattn.ContextParallel()
    held = []
    for seq_len in (64, 8, 40, 3):
        case = Case(seq_len, 1, 2, 1, 8)
        inputs = make_inputs(case, seq_len)
        q, k, v = (cp.shard(x).requires_grad_() for x in inputs[:3])
        held.append((case, inputs, (q, k, v), cp.attention(q, k, v, causal=True, seq_len=seq_len)))
    for case, inputs, leaves, out in reversed(held):
        grads = torch.autograd.grad(out, leaves, cp.shard(inputs.dout))
        got = Result(*(cp.unshard(x.detach(), seq_len=case.seq_len) for x in (out, *grads)))
        assert_close(got, exact(case, inputs), exact(case, inputs))


def test_calls_of_many_shapes_share_buffers():
    run_ranks(3, many_shapes)
