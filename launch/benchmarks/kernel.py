"""bench=kernel: local attention on one GPU, ours and the peers', on the same inputs in one run.

Whatever an implementation computes is compared with fp64 before it is timed. Then all of them take turns in shuffled
order, some rounds of that, so that a GPU that warms up or is shared does no one a favour.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import Any

import torch

from ..gang import Place
from ..oracle import Case, make_inputs
from ..records import circumstances
from ..settings import Parallel, require, require_one_of
from .cases import DTYPES, PASSES, describe, matching, named_case, shape_of, tera_operations
from .desk import Desk
from .implementations import local_implementations
from .local import Implementation
from .timing import Deadline
from .torch_kernels import BY_TORCH
from .truth import Truth
from .workers import Failed, Worker, preload, tensors

__all__ = ["KernelBench", "measure"]

SPECIFICATION = "ringattn-reference"  # eager, and not meant to be fast: measured only if asked for by name
LEAST_SAMPLES, MOST_SAMPLES = 2, 100  # of one implementation and pass in one round


@dataclass(kw_only=True)
class KernelBench:
    """Which cases, which passes, how long."""

    bench: str = "kernel"
    cases: list[str] = field(default_factory=list)  # batch/q_heads:kv_heads/head_dim/seq_len/mask
    dtype: str = "auto"  # auto: bf16 on GPUs, else fp32
    passes: list[str] = field(default_factory=lambda: ["forward", "backward"])
    implementations: list[str] = field(default_factory=list)  # names or patterns; empty: see `chosen`
    rounds: int = 2
    budget_ms: float = 200.0  # for one implementation and pass in one round
    patience: float = 120.0  # seconds until an implementation that does not answer is ended
    deadline: float | None = None  # seconds after which nothing more is begun; what was measured is kept
    seed: int = 0
    record: str | None = None  # a file of JSON lines to add the results to
    parallel: Parallel = field(default_factory=lambda: Parallel(ranks=1))

    def __post_init__(self) -> None:
        for text in self.cases:
            named_case(text)
        require_one_of("dtype", self.dtype, ("auto", *DTYPES))
        for which in self.passes:
            require_one_of("passes", which, tuple(PASSES))
        matching("implementations", self.implementations, local_implementations())
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        require(self.budget_ms > 0, "budget_ms", self.budget_ms, "more than 0")
        require(self.patience > 0, "patience", self.patience, "more than 0 seconds")
        require(self.parallel.ranks == 1, "parallel.ranks", self.parallel.ranks, "1: bench=kernel measures one GPU")

    def chosen(self, device: torch.device) -> list[Implementation]:
        """Unless told, all but the specification, and on GPUs but torch's kernels behind our interface: they appear as
        torch's own."""
        known = local_implementations()
        left_out = {SPECIFICATION, *(f"ringattn-{name}" for name in BY_TORCH if device.type == "cuda")}
        standard = [each for name, each in known.items() if name not in left_out]
        return matching("implementations", self.implementations, known) or standard

    def named_cases(self, device: torch.device) -> list[Case]:
        auto = "bf16" if device.type == "cuda" else "fp32"
        return [named_case(text, DTYPES[auto if self.dtype == "auto" else self.dtype]) for text in self.cases]


def run(settings: KernelBench, place: Place) -> Iterator[list[dict[str, Any]]]:
    """The records of one case after the other; prints what gets no figure, and why."""
    preload(Desk.__module__)
    return measure(settings.chosen(place.device), settings.named_cases(place.device), settings, place.device)


def measure(
    implementations: list[Implementation], cases: list[Case], settings: KernelBench, device: torch.device
) -> Iterator[list[dict[str, Any]]]:
    """For each case, a record for every implementation and pass that gave a right result in time."""
    common = circumstances(1) | {"bench": settings.bench}
    deadline = Deadline(settings.deadline)
    workers: dict[str, Worker] = {}
    try:
        for number, case in enumerate(cases):
            if deadline.passed():
                print(f"{describe(case)}: not measured: the deadline passed", flush=True)
                continue
            began = time.monotonic()
            for each in implementations:  # one that was ended starts anew
                if each.name not in workers:
                    workers[each.name] = Worker(Desk, each, device)
            contest = Contest(workers, case, settings)
            contest.load()
            contest.check(device)
            yield [common | row for row in contest.take_turns(deadline)]
            print(f"{describe(case)}: case {number + 1} of {len(cases)}, {time.monotonic() - began:.1f} s", flush=True)
    finally:
        for worker in workers.values():
            worker.end()


class Contest:
    """One case, and the implementations that are still in the running for a figure."""

    def __init__(self, workers: dict[str, Worker], case: Case, settings: KernelBench):
        self.workers, self.case, self.settings = workers, case, settings
        self.running = list(workers)

    def exclude(self, name: str, reason: str) -> None:
        self.running.remove(name)
        print(f"{describe(self.case)}: no figure for {name}: {reason}", flush=True)

    def tell_all(self, command: str, *arguments: Any) -> None:
        for name in self.running:
            self.workers[name].tell(command, *arguments)

    def hear(self, name: str) -> Any:
        """What the worker answered, or None if it is out for not answering."""
        try:
            return self.workers[name].hear(self.settings.patience)
        except Failed as failure:
            self.exclude(name, str(failure))
            self.workers.pop(name).end()
            return None

    def load(self) -> None:
        """Inputs for all, at once; some refuse them."""
        self.tell_all("load", self.case, self.settings.seed)
        for name in list(self.running):
            refusal = self.hear(name)
            if refusal is not None:
                self.exclude(name, refusal)

    def check(self, device: torch.device) -> None:
        """All compute, compile and warm up at once; those that compute something else than attention are out."""
        case = self.case
        batch, group = case.batch - 1, case.kv_heads - 1  # the last of all, whose addresses are the highest
        self.tell_all("check", batch, group)
        truth = Truth(case, make_inputs(case, self.settings.seed, device), batch, group)
        for name in list(self.running):
            heads = self.hear(name)
            if heads is None:
                continue
            faults = truth.faults(tensors(heads, case.dtype))
            if faults:
                told = (f"{part} errs {error:.1e}, allowed {allowed:.1e}" for part, (error, allowed) in faults.items())
                self.exclude(name, "wrong: " + ", ".join(told))
        del truth
        if device.type == "cuda":
            torch.cuda.empty_cache()  # a worker may need it

    def turns(self) -> list[tuple[str, str]]:
        """Who is timed at what. A deterministic way is one of the backward: its forward is the same."""
        turns = product(self.running, self.settings.passes)
        return [(name, which) for name, which in turns if which != "forward" or not name.endswith("-deterministic")]

    def take_turns(self, deadline: Deadline) -> list[dict[str, Any]]:
        """Times everybody, in another order each round, until all rounds are over or the deadline is."""
        times: dict[tuple[str, str], list[float]] = {}
        memory: dict[tuple[str, str], float | None] = {}
        order = random.Random(self.settings.seed)
        for _ in range(self.settings.rounds):
            turns = self.turns()
            order.shuffle(turns)
            for name, which in turns:
                if name not in self.running or deadline.passed():
                    continue  # it failed earlier in this round, or there is no time left
                self.workers[name].tell("measure", which, self.settings.budget_ms, LEAST_SAMPLES, MOST_SAMPLES)
                answer = self.hear(name)
                if answer is not None:
                    samples, memory[name, which] = answer
                    times.setdefault((name, which), []).extend(samples)
        rows = []
        for name, which in self.turns():
            if (name, which) in times:
                rows.append(row(self.case, name, which, times[name, which], memory[name, which]))
            else:
                print(f"{describe(self.case)}: no figure for {name}, {which}: the deadline passed", flush=True)
        return rows


def row(case: Case, name: str, which: str, samples: list[float], memory: float | None) -> dict[str, Any]:
    """A measurement in the fields of a record."""
    middle = median(samples)
    return (
        {"impl": name}
        | shape_of(case)
        | {
            "pass": which,
            "median_ms": middle,
            "min_ms": min(samples),
            "max_ms": max(samples),
            "tflops_per_gpu": 1e3 * tera_operations(case, which) / middle,
            "efficiency": None,  # of several GPUs against one
            "peak_memory_gib": memory,
        }
    )
