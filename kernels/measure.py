"""Measures tilings on the GPU at hand, beside torch's own kernels in the same run.

    python -m ringattn.kernels.measure --head-dim 128 --length 8192 32768 --out sweep.json

Each tiling gets processes of its own, with deadlines. First all tilings, side by side, compile, are held against torch
on a small problem and must give the same bits ten times. Those that pass are then timed one after the other, with the
GPU to themselves. What is printed last are the best tilings, as rows of `tuning.TABLE`. Figures are medians of causal
attention; "of cuDNN" is cuDNN's time for the whole forward or backward, measured just before in the same process, over
ours.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from .aten import AtenKernel, CudnnKernel
from .segments import Segment, Segments
from .tuning import LONG, PASSES, Key, Tiling, architecture, tiling_for

__all__ = ["main"]

DEADLINE = 150  # seconds for one tiling, waiting for its turn included
CHECK, TIME = "check", "time"
PEERS = {"cudnn": CudnnKernel(), "fa2": AtenKernel()}
PRODUCTS = {"forward": 2, "key gradients": 4, "query gradients": 3, "backward": 5}


class Shape(NamedTuple):
    """Causal attention of one sequence length."""

    length: int
    head_dim: int
    batch: int
    q_heads: int
    kv_heads: int

    def tflops(self, name: str, ms: float) -> float:
        """Of the products that a pass does, half of them masked. The passes of the backward do more together than one
        that shares its products would."""
        return PRODUCTS[name] * self.batch * self.q_heads * self.length**2 * self.head_dim / ms / 1e9


class Problem:
    """Random inputs, and everything that the passes need."""

    def __init__(self, shape: Shape):
        generator = torch.Generator("cuda").manual_seed(0)
        size = (shape.batch, shape.length, shape.q_heads, shape.head_dim)
        self.q, self.dout = (self.random(size, generator) for _ in range(2))
        size = (shape.batch, shape.length, shape.kv_heads, shape.head_dim)
        self.k, self.v = (self.random(size, generator) for _ in range(2))
        self.segments = Segments([Segment(0, shape.length, 0, shape.length, 0)])
        self.scale = shape.head_dim**-0.5

    @staticmethod
    def random(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)

    def peer(self, name: str, direction: str) -> Callable[[], tuple[Tensor, ...]]:
        """A pass of torch's kernels."""
        kernel, inputs = PEERS[name], (self.q, self.k, self.v)
        if direction == "forward":
            return lambda: kernel.attend(*inputs, True, self.scale)
        out, lse = kernel.attend(*inputs, True, self.scale)
        return lambda: kernel.differentiate(self.dout, *inputs, out, lse, True, self.scale)

    def ours(self, name: str) -> Callable[[], tuple[Tensor, ...]]:
        """A pass of these kernels; "backward" is what a backward takes in all, delta too."""
        from . import triton_launch

        inputs = (self.q, self.k, self.v, self.segments, self.scale)
        if name == "forward":
            return lambda: triton_launch.forward(*inputs, None, torch.bfloat16)
        out, lse = triton_launch.forward(*inputs, None, torch.bfloat16)
        delta = triton_launch.row_delta(self.dout, out)
        rest = (self.dout, *inputs[:3], lse)
        calls = {
            "key gradients": lambda d: triton_launch.key_gradients(*rest, d, *inputs[3:], None, None),
            "query gradients": lambda d: (triton_launch.query_gradients(*rest, d, *inputs[3:], None),),
        }
        if name in calls:
            return lambda: calls[name](delta)

        def backward() -> tuple[Tensor, ...]:
            delta = triton_launch.row_delta(self.dout, out)
            return (*calls["query gradients"](delta), *calls["key gradients"](delta))

        return backward


def milliseconds(call: Callable[[], object], budget: float = 0.25) -> float:
    """Median of as many calls as `budget` seconds have room for, 5 at least, each into a cold L2 cache.

    The write that empties the cache also keeps the GPU busy while the host issues the call, so that what is measured is
    the GPU's time.
    """
    times: list[float] = []
    cold = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while len(times) < 5 or (len(times) < 100 and time.perf_counter() - begin < budget):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def microseconds_to_issue(call: Callable[[], object]) -> float:
    """Host time of one call, the GPU being left behind."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(200):
        call()
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return elapsed / 200 * 1e6


def check(name: str, shape: Shape) -> None:
    """Raises where a pass is wrong, or not the same from run to run, at a length that no tile divides."""
    problem = Problem(shape._replace(length=1000))
    out, _ = problem.peer("fa2", "forward")()
    dq, dk, dv = problem.peer("fa2", "backward")()
    expected = {"forward": (out,), "key gradients": (dk, dv), "query gradients": (dq,), "backward": (dq, dk, dv)}
    call = problem.ours(name)
    first = call()
    for got, right in zip(first, expected[name], strict=False):
        distance = ((got.float() - right.float()).norm() / right.float().norm()).item()
        if not distance < 0.02:
            raise AssertionError(f"{name} is off by {distance:.1%}")
    if not all(torch.equal(a, b) for _ in range(10) for a, b in zip(first, call(), strict=True)):
        raise AssertionError(f"{name} differs from run to run")


def take_turn(what: str, name: str, tiling: Tiling | None, shapes: list[Shape], turn: str) -> dict:
    """Checks or times a pass with a tiling of its own, or with the table's: {length: figures}."""
    from . import triton_launch

    if tiling is not None:
        triton_launch.tiling_for = lambda other, *key: tiling if other == name else tiling_for(other, *key)
    if what == CHECK:
        check(name, shapes[0])
        for shape in shapes:
            Problem(shape).ours(name)()  # into the compiler's cache
        torch.cuda.synchronize()
        return {}
    result = {}
    direction = "forward" if name == "forward" else "backward"
    with open(turn, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check(name, shapes[0])
        for shape in shapes:
            problem = Problem(shape)
            figures = {"cudnn": milliseconds(problem.peer("cudnn", direction), 0.1)}
            if tiling is None:
                figures["fa2"] = milliseconds(problem.peer("fa2", direction), 0.1)
                figures["issue_us"] = microseconds_to_issue(Problem(shape._replace(length=256)).ours(name))
            figures["ours"] = milliseconds(problem.ours(name))
            result[shape.length] = figures
    return result


def candidates(name: str, family: str) -> list[Tiling]:
    """What is worth trying. Tiles that are known to spill registers or to serialise the matrix units are left out."""
    if name == "forward":
        sizes = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 2)]
    elif name == "key gradients":
        sizes = [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (32, 128, 8, 3), (32, 64, 4, 3)]
    else:
        sizes = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 2), (128, 64, 4, 2)]
    pointers = [Tiling(*size) for size in (sizes[:2] if family == "sm_90" else sizes)]
    if family in ("sm_80", "sm_86", "other"):
        return pointers
    described = [Tiling(*size, tma=True) for size in sizes]
    pairs = [t._replace(registers=128) for t in described if name == "forward" and t.warps == 8]
    return [*pairs, *described, *pointers]


def run_apart(what: str, name: str, tiling: Tiling | None, shapes: list[Shape], turn: str) -> dict:
    """`take_turn` in a process of its own: {"tiling", "figures"} or {"tiling", "failed"}."""
    task = json.dumps([what, name, tiling, shapes, turn])
    command = [sys.executable, "-m", "ringattn.kernels.measure", "--task", task]
    answer: dict = {"pass": name, "tiling": tiling}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        return answer | {"failed": f"no result within {DEADLINE} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
    return answer | ({"figures": json.loads(lines[-1])} if done.returncode == 0 else {"failed": lines[-1]})


def describe(tiling: Tiling | None) -> str:
    if tiling is None:
        return "the table's"
    extras = " tma" * tiling.tma + (f", {tiling.registers} registers" if tiling.registers else "")
    return f"{tiling.rows} x {tiling.keys}, {tiling.warps} warps, {tiling.stages} stages{extras}"


def tell(shapes: list[Shape], answers: list[dict], family: str) -> None:
    """Prints every result, then what torch's kernels and the table's tilings reach, then the best tilings."""
    best: dict[tuple[str, int], tuple[float, Tiling]] = {}
    for answer in sorted(answers, key=lambda a: (a["tiling"] is None, (*PASSES, "backward").index(a["pass"]))):
        name, tiling = answer["pass"], answer["tiling"]
        if "failed" in answer:
            print(f"{name:16} {describe(tiling):40} {answer['failed'][:100]}")
            continue
        cells = []
        for shape in shapes:
            figures = answer["figures"][str(shape.length)]
            ms = figures["ours"]
            tflops, ratio = shape.tflops(name, ms), figures["cudnn"] / ms
            cell = f"{shape.length}: {ms:.3f} ms {tflops:.0f} TFLOP/s {ratio:.2f} of cuDNN"
            if tiling is None:
                cell += f" {figures['fa2'] / ms:.2f} of FA2 ({figures['issue_us']:.0f} us to issue)"
            elif (name, shape.length) not in best or ms < best[name, shape.length][0]:
                best[name, shape.length] = ms, tiling
            cells.append(cell)
        print(f"{name:16} {describe(tiling):40} {'  '.join(cells)}")
    for (name, length), (ms, tiling) in best.items():
        key = Key(name, family, "half", shapes[0].head_dim, "long" if length >= LONG else "short")
        print(f"{length:6} {ms:8.3f} ms  {key}: {tiling}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ringattn.kernels.measure", description=__doc__)
    parser.add_argument("--length", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("QUERY", "KV"))
    parser.add_argument("--passes", nargs="*", choices=PASSES, default=PASSES, help="whose tilings to try")
    parser.add_argument("--out", type=Path, help="a file for every figure, as JSON")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        what, name, tiling, shapes, turn = json.loads(options.task)
        tiling = None if tiling is None else Tiling._make(tiling)
        print(json.dumps(take_turn(what, name, tiling, [Shape._make(shape) for shape in shapes], turn)))
        return
    q_heads, kv_heads = options.heads
    shapes = [Shape(length, options.head_dim, options.batch, q_heads, kv_heads) for length in options.length]
    family = architecture(torch.device("cuda", 0))
    tasks: list[tuple[str, Tiling | None]] = [
        (name, tiling) for name in options.passes for tiling in candidates(name, family)
    ]
    tasks += [("forward", None), ("backward", None)]
    with tempfile.NamedTemporaryFile() as turn, ThreadPoolExecutor(max((os.cpu_count() or 2) - 3, 1)) as pool:
        checks = list(pool.map(lambda task: run_apart(CHECK, task[0], task[1], shapes, turn.name), tasks))
        passed = [task for task, answer in zip(tasks, checks, strict=True) if "failed" not in answer]
        answers = [answer for answer in checks if "failed" in answer]
        answers += pool.map(lambda task: run_apart(TIME, task[0], task[1], shapes, turn.name), passed)
    if options.out:
        options.out.write_text(json.dumps({"family": family, "shapes": shapes, "answers": answers}, indent=1))
    tell(shapes, answers, family)


if __name__ == "__main__":
    main()
