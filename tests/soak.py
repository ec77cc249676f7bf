"""Many steps of mixed shapes with random delays, several layers and streams in flight: every result must be right, and
bit for bit what the same inputs gave before; dq only if it is told to be deterministic. And the death of a rank."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import time
from contextlib import nullcontext
from functools import cache
from itertools import count, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ringattn
from ringattn.kernels.registry import choose_kernel
from ringattn.launch.oracle import Case, Inputs, Result, attend_on_one_rank, exact, make_inputs
from ringattn.transport.interface import TransportError
from tests.tolerance import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DOCUMENTS = (0, 100, 777, 778, 1500)
CASES = {  # on each kind of device, with a layout; few heads and head dims, each of which compiles kernels anew
    "cuda": [
        (Case(2048, 1, 32, 8, 128, True, BF16), "zigzag"),
        (Case(1024, 2, 32, 8, 128, True, BF16, window=300), "contiguous"),
        (Case(2048, 1, 32, 8, 128, True, BF16, documents=DOCUMENTS), "balanced"),
        (Case(352, 1, 32, 8, 128, False, BF16), "zigzag"),
        (Case(4096, 2, 4, 4, 64, True, FP16), "zigzag"),
        (Case(1536, 1, 4, 4, 64, True, FP16), "striped"),
        (Case(512, 1, 4, 4, 64, False, FP16), "contiguous"),
        (Case(7, 1, 4, 4, 64, True, FP16), "zigzag"),
        (Case(512, 1, 4, 2, 32, True, FP32), "zigzag"),
        (Case(800, 1, 4, 2, 32, True, FP32, documents=DOCUMENTS[:3]), "balanced"),
    ],
    "cpu": [
        (Case(256, 1, 4, 2, 16, True, FP32), "zigzag"),
        (Case(131, 2, 4, 2, 16, True, FP32, window=40), "contiguous"),
        (Case(800, 1, 4, 2, 16, True, FP32, documents=DOCUMENTS[:3]), "balanced"),
        (Case(7, 1, 4, 2, 16, False, FP32), "zigzag"),
    ],
}
SEEDS = 2  # inputs of a configuration: what an earlier step left must not pass for this one's
DEPTH = 3  # layers in flight, at most
LOOK = 500  # steps between looks, so that the host runs ahead
PATIENCE = 25.0  # seconds between looks, after which all stacks are shown and the rank ends


class Way(NamedTuple):
    """A configuration: what is computed, and how."""

    case: Case
    layout: str
    executor: str
    deterministic: bool


def ways(device: str, executors: tuple[str, ...]) -> list[Way]:
    return [Way(*case, *how) for case, how in product(CASES[device], product(executors, (True, False)))]


class Soak:
    """One rank's inputs and first results of every configuration, and how many numbers have differed from them."""

    def __init__(self, rank: int, device: str):
        self.rank, self.device = rank, device
        self.first: dict[tuple[Way, int], Result] = {}
        self.inputs: dict[tuple[Case, str, int], Inputs] = {}
        self.delays = random.Random(rank + 1)
        self.streams: list[Any] = [torch.cuda.Stream() for _ in range(2)] if device == "cuda" else [None]
        self.wrong = [torch.zeros(4, dtype=torch.int64, device=device) for _ in self.streams]
        torch.cuda.synchronize() if device == "cuda" else None

    def delay(self, longest: float) -> None:
        """Now and then, on the host, on the GPU."""
        if self.delays.random() < 0.1:
            time.sleep(self.delays.random() * longest)
        if self.device == "cuda" and self.delays.random() < 0.1:
            torch.cuda._sleep(int(self.delays.random() * longest * 1.5e9))

    def forward(self, way: Way, seed: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """out, what it is to be differentiated by, and its gradient."""
        cp = context(way)
        name = way.case, way.layout, seed
        if name not in self.inputs:
            whole = make_inputs(way.case, seed, self.device)
            self.inputs[name] = Inputs(*(cp.shard(x, cu_seqlens=way.case.documents) for x in whole))
        *qkv, dout = self.inputs[name]
        leaves = [x.detach().requires_grad_() for x in qkv]
        return cp.attention(*leaves, seq_len=way.case.seq_len, **way.case.mask), leaves, dout

    def learn(self, way: Way, seed: int) -> None:
        """Holds the first result against fp64. Collective."""
        out, leaves, dout = self.forward(way, seed)
        self.first[way, seed] = got = result_of(out, leaves, dout)
        case, cp = way.case, context(way)
        whole = Result(*(cp.unshard(x, seq_len=case.seq_len, cu_seqlens=case.documents) for x in got))
        assert_close(whole, *right(case, seed, self.device))

    def compare(self, way: Way, seed: int, got: Result, wrong: Tensor) -> None:
        for number, (a, b) in enumerate(zip(got, self.first[way, seed], strict=True)):
            if number == 1 and not way.deterministic:  # dq may be summed in any order
                wrong[number] += (~torch.isclose(a, b, rtol=0.02, atol=0.02)).sum()
            else:
                wrong[number] += (a != b).sum()

    def look(self, step: int) -> None:
        torch.cuda.synchronize() if self.device == "cuda" else None
        wrong = torch.stack(self.wrong).sum(0).tolist()
        assert not any(wrong), f"up to step {step}, numbers of out, dq, dk and dv that differ: {wrong}"


@cache
def right(case: Case, seed: int, device: str) -> tuple[Result, Result]:
    """In fp64, and by the same kernel on one rank."""
    inputs = make_inputs(case, seed, device)
    return exact(case, inputs), attend_on_one_rank(choose_kernel("auto", *inputs[:3]).kernel, case, inputs)


@cache
def context(way: Way) -> ringattn.ContextParallel:
    return ringattn.ContextParallel(layout=way.layout, executor=way.executor, deterministic=way.deterministic)


def result_of(out: Tensor, leaves: list[Tensor], dout: Tensor) -> Result:
    return Result(out.detach(), *torch.autograd.grad(out, leaves, dout))


def compile_ahead(rank: int, device: str, executors: tuple[str, ...], part: int, parts: int) -> None:
    """Every configuration once. Of some that do so side by side, each begins elsewhere and finds what others have
    compiled."""
    all_ways = ways(device, executors)
    start = part * len(all_ways) // parts
    work = Soak(rank, device)
    for way in all_ways[start:] + all_ways[:start]:
        result_of(*work.forward(way, 0))


def soak(rank: int, device: str, executors: tuple[str, ...], steps: int, delay: float = 2e-3) -> int:
    """Steps done. Ranks draw the same configurations, depths and streams, and each its own delays."""
    began = time.monotonic()
    work, shared, all_ways = Soak(rank, device), random.Random(0), ways(device, executors)
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
    for way, seed in product(all_ways, range(SEEDS)):
        work.learn(way, seed)
    torch.cuda.synchronize() if device == "cuda" else None
    say(rank, f"{len(work.first)} first results are right, {time.monotonic() - began:.1f} s")
    began, done, looked = time.monotonic(), 0, 0
    while done < steps:
        flying = []
        for _ in range(min(shared.randint(1, DEPTH), steps - done)):
            way, seed, lane = shared.choice(all_ways), shared.randrange(SEEDS), shared.randrange(len(work.streams))
            with on(work.streams[lane]):
                work.delay(delay)
                flying.append((way, seed, lane, work.forward(way, seed)))
        for way, seed, lane, parts in reversed(flying):
            with on(work.streams[lane]):
                work.delay(delay)
                work.compare(way, seed, result_of(*parts), work.wrong[lane])
        done += len(flying)
        if done - looked >= LOOK or done == steps:
            work.look(done)
            looked = done
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            took = time.monotonic() - began
            say(rank, f"{done} steps in {took:.1f} s, {done / took:.0f} a second")
    faulthandler.cancel_dump_traceback_later()
    return steps


def die_in_the_middle(rank: int, device: str, executor: str, deadline: float, where: str) -> str:
    """The last rank kills itself in the middle of a forward or a backward, several layers being in flight; what the
    others were told, and that they live on. What they computed without it is right or NaN."""
    way, work = Way(*CASES[device][0], executor, True), Soak(rank, device)
    dies = rank == torch.distributed.get_world_size() - 1
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
    expected = result_of(*work.forward(way, 0))
    assert all(x.isfinite().all() for x in expected)
    results, start = [], time.monotonic()
    try:
        for turn in count():
            flying = []
            for layer in range(DEPTH):
                flying.append(work.forward(way, 0))
                if dies and (turn, layer, where) == (2, 1, "forward"):
                    os.kill(os.getpid(), signal.SIGKILL)
            for layer in range(DEPTH):
                results.append(result_of(*flying.pop()))
                if dies and (turn, layer, where) == (2, 1, "backward"):
                    os.kill(os.getpid(), signal.SIGKILL)
            assert time.monotonic() - start < 4 * deadline, "nobody raised"
            torch.cuda.synchronize() if device == "cuda" else None
    except (TransportError, ringattn.RankDisagreement) as error:
        assert time.monotonic() - start < 2 * deadline + 5
        for got in results:
            for x, y in zip(got, expected, strict=True):
                assert torch.equal(x, y) or x.isnan().any(), "old numbers were taken for new ones"
        faulthandler.cancel_dump_traceback_later()
        return str(error)
    raise AssertionError("unreachable")


def on(stream: Any):
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def say(rank: int, what: str) -> None:
    if rank == 0:
        print("soak:", what, file=sys.stderr, flush=True)
