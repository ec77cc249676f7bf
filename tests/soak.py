"""Many steps of mixed shapes with random delays: every result must be, bit for bit, what the same inputs gave first."""

from __future__ import annotations

import os
import random
import signal
import time

import torch

import ringattn
from ringattn.transport.interface import TransportError

# batch, tokens of the whole sequence, q heads, kv heads, head dim, causal
SHAPES = [(1, 512, 8, 2, 64, True), (2, 131, 4, 4, 64, True), (1, 7, 4, 1, 64, False), (1, 2048, 8, 2, 64, True)]


def soak(rank: int, device: str, executor: str, steps: int, delay: float = 2e-3, check: bool = True) -> int:
    """Steps done. Ranks draw the same shapes, and each its own delays, on the host and on the GPU."""
    shared, own = random.Random(0), random.Random(rank + 1)
    cp = ringattn.ContextParallel(executor=executor)
    inputs, first = {}, {}
    wrong = torch.zeros(4, dtype=torch.int64, device=device)
    for step in range(steps):
        shape = shared.choice(SHAPES)
        batch, seq_len, q_heads, kv_heads, head_dim, causal = shape
        if shape not in inputs:
            generator = torch.Generator(device).manual_seed(len(inputs))
            heads = (q_heads, kv_heads, kv_heads, q_heads)
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            inputs[shape] = [
                cp.shard(torch.randn(batch, seq_len, h, head_dim, device=device, generator=generator).to(dtype))
                for h in heads
            ]
        q, k, v, dout = inputs[shape]
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        if own.random() < 0.1:
            time.sleep(own.random() * delay)
        if device == "cuda" and own.random() < 0.1:
            torch.cuda._sleep(int(own.random() * delay * 1.5e9))
        out = cp.attention(*leaves, causal=causal, seq_len=seq_len)
        result = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        if shape not in first:
            assert not check or all(x.isfinite().all() for x in result)
            first[shape] = result
        for number, (a, b) in enumerate(zip(result, first[shape], strict=True)):
            wrong[number] += (a != b).sum()  # looked at now and then, so that the host runs ahead
        if check and step % 100 == 99:
            assert not wrong.any(), f"up to step {step}, numbers of out, dq, dk and dv that differ: {wrong.tolist()}"
    assert not (check and wrong.any()), wrong.tolist()
    return steps


def die_in_the_middle(rank: int, device: str, executor: str, deadline: float) -> str:
    """The last rank kills itself; what the others were told, and that they live on."""
    soak(rank, device, executor, 20)
    if device == "cuda":
        torch.cuda.synchronize()
    if rank == torch.distributed.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        while time.monotonic() - start < 4 * deadline:
            soak(rank, device, executor, 20, check=False)  # wrong numbers may come before the error
            if device == "cuda":
                torch.cuda.synchronize()
    except (TransportError, ringattn.RankDisagreement) as error:
        assert time.monotonic() - start < 2 * deadline + 5
        alive = torch.ones(1000, device=device)
        assert alive.sum().item() == 1000
        return str(error)
    raise AssertionError("nobody raised")
