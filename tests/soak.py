"""Many steps of mixed shapes with random delays: every result must be, bit for bit, what the same inputs gave first; dq
only if it is told to be deterministic."""

from __future__ import annotations

import os
import random
import signal
import time

import torch

import ringattn
from ringattn.transport.interface import TransportError

# batch, tokens of the whole sequence, causal; 8 query heads, 2 key/value heads, head dim 64
SHAPES = [(1, 512, True), (2, 131, True), (1, 7, False), (1, 2048, True), (1, 3000, True)]
LOOK = 50  # steps between looks, so that the host runs ahead


def soak(
    rank: int, device: str, executors: tuple[str, ...], steps: int, delay: float = 2e-3, check: bool = True
) -> int:
    """Steps done, each with one of the executors. Ranks draw the same shapes, and each its own delays, on the host and
    on the GPU."""
    shared, own = random.Random(0), random.Random(rank + 1)
    ways = {(e, d): ringattn.ContextParallel(executor=e, deterministic=d) for e in executors for d in (True, False)}
    inputs, first = {}, {}
    wrong = torch.zeros(4, dtype=torch.int64, device=device)
    for step in range(steps):
        shape, way = shared.choice(SHAPES), shared.choice(list(ways))
        batch, seq_len, causal = shape
        cp = ways[way]
        if shape not in inputs:
            generator = torch.Generator(device).manual_seed(len(inputs))
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            inputs[shape] = [
                cp.shard(torch.randn(batch, seq_len, heads, 64, device=device, generator=generator).to(dtype))
                for heads in (8, 2, 2, 8)
            ]
        q, k, v, dout = inputs[shape]
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        if own.random() < 0.1:
            time.sleep(own.random() * delay)
        if device == "cuda" and own.random() < 0.1:
            torch.cuda._sleep(int(own.random() * delay * 1.5e9))
        out = cp.attention(*leaves, causal=causal, seq_len=seq_len)
        result = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        if (shape, way) not in first:
            assert not check or all(x.isfinite().all() for x in result)
            first[shape, way] = result
            for x, y in zip(result, first.setdefault(shape, result), strict=True):
                assert not check or torch.allclose(x, y, rtol=0.02, atol=0.02), f"{way} differs from others for {shape}"
        for number, (a, b) in enumerate(zip(result, first[shape, way], strict=True)):
            if number == 1 and way[1] is False:  # dq may be summed in any order
                wrong[number] += (~torch.isclose(a, b, rtol=0.02, atol=0.02)).sum()
            else:
                wrong[number] += (a != b).sum()
        if check and step % LOOK == LOOK - 1:
            assert not wrong.any(), f"up to step {step}, numbers of out, dq, dk and dv that differ: {wrong.tolist()}"
    assert not (check and wrong.any()), wrong.tolist()
    return steps


def die_in_the_middle(rank: int, device: str, executor: str, deadline: float) -> str:
    """The last rank kills itself; what the others were told, and that they live on. What they computed without it is
    right or NaN."""
    soak(rank, device, (executor,), 20)
    cp = ringattn.ContextParallel(executor=executor)
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (
        cp.shard(torch.randn(1, 1024, heads, 64, device=device, generator=generator).to(dtype)) for heads in (8, 2, 2)
    )
    right, results = cp.attention(q, k, v, seq_len=1024), []
    assert right.isfinite().all()
    if rank == torch.distributed.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        while time.monotonic() - start < 4 * deadline:
            results.append(cp.attention(q, k, v, seq_len=1024))
            if device == "cuda":
                torch.cuda.synchronize()
    except (TransportError, ringattn.RankDisagreement) as error:
        assert time.monotonic() - start < 2 * deadline + 5
        assert all(torch.equal(x, right) or x.isnan().any() for x in results), "old numbers were taken for new ones"
        return str(error)
    raise AssertionError("nobody raised")
