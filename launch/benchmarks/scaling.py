"""bench=scaling: attention across ranks, ours and the peers', on the same inputs in one run.

Every rank holds what it computes against fp64 before anything is timed. Then all implementations take turns in
shuffled order. A figure is the slowest rank's time; the median is over windows of steps that the host issues without
waiting, and `synchronised_ms` is the same with a wait after each step. With P ranks:

    efficiency  = one GPU's time for the whole sequence with the fastest of our kernels / (P x median_ms)
    exposed_ms  = median_ms - the time of one rank's share of the work when all that it needs is there
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from ringattn.kernels.registry import KERNELS

from ..gang import Place
from ..oracle import Case
from ..records import circumstances
from ..settings import Parallel, require, require_one_of
from .across import Across, Local, ours_across
from .baselines import AllGather, Ulysses
from .cases import DTYPES, MASKS, describe, shape_of, tera_operations
from .crew import Crew
from .kernel import SPECIFICATION
from .peers import RingFlashAttention, TorchContextParallel
from .station import Station
from .timing import Meter
from .workers import Failed, preload

__all__ = ["ScalingBench", "across_implementations", "measure"]

PASSES = ("forward", "forward+backward")
TOKENS = {"cuda": (2048, 8192, 32768), "cpu": (64,)}  # on each rank
Figures = dict[str, Any]


def across_implementations(peer_kernel: str, causal: bool) -> dict[str, Across]:
    """All that this bench knows, by name: ours first, then the peers over a kernel of torch."""
    peers = [
        *(TorchContextParallel(rotation, peer_kernel, causal) for rotation in ("allgather", "alltoall")),
        *(RingFlashAttention(variant, peer_kernel) for variant in RingFlashAttention.VARIANTS),
        Ulysses(peer_kernel),
        AllGather(peer_kernel, causal),
    ]
    return {each.name: each for each in (*ours_across(), *peers)}


@dataclass(kw_only=True)
class ScalingBench:
    """Which cases, which implementations, how long."""

    bench: str = "scaling"
    tokens: list[int] = field(default_factory=list)  # on each rank; empty: 2048, 8192, 32768 on GPUs, 64 on CPUs
    batch: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mask: str = "causal"
    dtype: str = "auto"  # auto: bf16 on GPUs, else fp32
    passes: list[str] = field(default_factory=lambda: list(PASSES))
    implementations: list[str] = field(default_factory=list)  # empty: all but those over the specification
    peer_kernel: str = "auto"  # beneath the peers: cudnn, aten (FlashAttention-2); auto: cudnn on GPUs
    rounds: int = 2
    ahead: int = 12  # steps that the host issues before it waits; fewer where they take longer than the budget
    budget_ms: float = 400.0  # for one implementation, pass and way of waiting in one round
    patience: float = 120.0  # seconds until workers that do not answer are ended
    seed: int = 0
    record: str | None = None  # a file of JSON lines to add the results to
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self) -> None:
        for key in ("batch", "q_heads", "kv_heads", "head_dim", "rounds", "ahead"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(min(self.tokens, default=1) >= 1, "tokens", self.tokens, "numbers of at least 1")
        require(self.q_heads % self.kv_heads == 0, "kv_heads", self.kv_heads, f"a divisor of q_heads={self.q_heads}")
        require_one_of("mask", self.mask, tuple(MASKS))
        require_one_of("dtype", self.dtype, ("auto", *DTYPES))
        require_one_of("peer_kernel", self.peer_kernel, ("auto", "cudnn", "aten"))
        for key, names in (("passes", PASSES), ("implementations", across_implementations("aten", True))):
            for name in getattr(self, key):
                require_one_of(key, name, tuple(names))
        require(self.budget_ms > 0, "budget_ms", self.budget_ms, "more than 0")
        require(self.patience > 0, "patience", self.patience, "more than 0 seconds")
        require(self.parallel.ranks != 1, "parallel.ranks", 1, "at least 2: bench=kernel measures one GPU")

    def chosen(self, device: torch.device) -> list[Across]:
        auto = "cudnn" if device.type == "cuda" and self.head_dim <= 128 else "aten"
        known = across_implementations(auto if self.peer_kernel == "auto" else self.peer_kernel, MASKS[self.mask])
        names = self.implementations or [name for name in known if not name.startswith(SPECIFICATION)]
        return [known[name] for name in names]

    def cases(self, device: torch.device, ranks: int) -> list[Case]:
        auto = "bf16" if device.type == "cuda" else "fp32"
        dtype = DTYPES[auto if self.dtype == "auto" else self.dtype]
        heads = (self.q_heads, self.kv_heads, self.head_dim)
        tokens = self.tokens or TOKENS[device.type]
        return [Case(each * ranks, self.batch, *heads, MASKS[self.mask], dtype) for each in tokens]


def run(settings: ScalingBench, place: Place) -> Iterator[list[dict[str, Any]]]:
    """The records of one case after the other; prints what gets no figure, and why."""
    preload(Station.__module__, *(["torch._dynamo"] if place.device.type == "cpu" else []))
    return measure(settings.chosen(place.device), settings, place)


def measure(entrants: list[Across], settings: ScalingBench, place: Place) -> Iterator[list[dict[str, Any]]]:
    """For each case, a record for every implementation and pass that gave a right result in time."""
    common = circumstances(place.size) | {"bench": settings.bench}
    crew = Crew(Station, place, place.size, settings.patience)
    try:
        for case in settings.cases(place.device, place.size):
            contest = Contest(crew, entrants, case, settings)
            contest.check()
            yield [common | row for row in contest.take_turns()]
    finally:
        crew.end()


class Contest:
    """One case, and the implementations that are still in the running for a figure; the same on every rank."""

    def __init__(self, crew: Crew, entrants: list[Across], case: Case, settings: ScalingBench):
        self.crew, self.case, self.settings = crew, case, settings
        self.running = {each.name: each for each in entrants}
        self.meter = Meter(settings.budget_ms, settings.ahead)
        self.known: int | None = None  # the attempt of the crew that knows this case
        self.learned: int | None = None  # and what is right

    def exclude(self, name: str, reason: str) -> None:
        if self.crew.place.rank == 0:
            print(f"{describe(self.case)} on {self.crew.size}: no figure for {name}: {reason}", flush=True)

    def ask(self, command: str, *arguments: Any) -> list[Any]:
        """Asks a crew that knows the case."""
        if self.known != self.crew.attempt:
            self.crew.ask("load", self.case, self.settings.seed)
            self.known = self.crew.attempt
        return self.crew.ask(command, *arguments)

    def check(self) -> None:
        """All compute, compile and warm up; those that compute something else than attention are out."""
        for name, each in list(self.running.items()):
            try:
                reason = self.ask("refuses", each)[0] or self.faults(each)
            except Failed as failure:
                reason = str(failure)
            if reason:
                self.exclude(name, reason)
                del self.running[name]
        self.ask("forget")

    def faults(self, each: Across) -> str | None:
        """What is wrong with a result, on the first rank that found something."""
        if self.learned != self.crew.attempt:
            self.ask("learn")
            self.learned = self.crew.attempt
        for rank, faults in enumerate(self.ask("examine", each)):
            if faults:
                told = (f"{part} errs {error:.1e}, allowed {allowed:.1e}" for part, (error, allowed) in faults.items())
                return f"wrong on rank {rank}: " + ", ".join(told)
        return None

    def take_turns(self) -> list[dict[str, Any]]:
        """Times everybody, in another order each round."""
        samples: dict[tuple[str, str], list[Figures]] = {}
        order = random.Random(self.settings.seed)
        for _ in range(self.settings.rounds):
            turns = [(name, which) for name in self.running for which in self.settings.passes]
            order.shuffle(turns)
            for name, which in turns:
                if name not in self.running:
                    continue  # it failed earlier in this round
                try:
                    found = self.ask("time", self.running[name], which, self.meter)
                except Failed as failure:
                    self.exclude(name, str(failure))
                    del self.running[name]
                    continue
                samples.setdefault((name, which), []).append(over_ranks(found))
        references = References(self)
        return [
            self.row(each, which, samples[name, which], references)
            for name, each in self.running.items()
            for which in self.settings.passes
        ]

    def row(self, each: Across, which: str, rounds: list[Figures], references: References) -> dict[str, Any]:
        """A measurement in the fields of a record."""
        ahead = [ms for found in rounds for ms in found["ahead"]]
        synchronised = [ms for found in rounds for ms in found["synchronised"]]
        middle, ranks = median(ahead), self.crew.size
        alone, kernel = references.alone(which)
        share = references.share(each.local, which)
        return (
            {"impl": each.name}
            | shape_of(self.case)
            | {
                "pass": which,
                "median_ms": middle,
                "min_ms": min(ahead),
                "max_ms": max(ahead),
                "synchronised_ms": median(synchronised),
                "exposed_ms": share and middle - share,
                "tflops_per_gpu": 1e3 * tera_operations(self.case, which) / middle / ranks,
                "efficiency": alone and alone / (ranks * middle),
                "one_gpu_ms": alone,
                "one_gpu_impl": kernel and f"ringattn-{kernel}",
                "ranks": ranks,
                "kernel": each.kernel,
                "peak_memory_gib": rounds[0]["gib"],
            }
        )


class References:
    """What implementations are compared with, measured when first asked for; None where it cannot be."""

    def __init__(self, contest: Contest):
        self.contest = contest
        self.found: dict[Any, float | None] = {}

    def ms(self, command: str, subject: Any, which: str) -> list[float] | None:
        """The median on each rank."""
        try:
            answers = self.contest.ask(command, subject, which, self.contest.meter)
        except Failed as failure:
            self.contest.exclude(f"{command} {subject}, {which}", str(failure))
            return None
        return [median(answer["ahead"]) for answer in answers]

    def alone(self, which: str) -> tuple[float | None, str | None]:
        """The fastest GPU's time for the whole sequence, and the fastest of our kernels."""
        kernels = {each.kernel: None for each in self.contest.running.values() if each.kernel in KERNELS}
        for kernel in kernels:
            if (kernel, which) not in self.found:
                ranks = self.ms("time_alone", kernel, which)
                self.found[kernel, which] = ranks and min(ranks)
        times = {kernel: self.found[kernel, which] for kernel in kernels}
        known = {kernel: ms for kernel, ms in times.items() if ms is not None}
        if not known:
            return None, None
        best = min(known, key=known.__getitem__)
        return known[best], best

    def share(self, local: Local, which: str) -> float | None:
        """The slowest rank's time for its share of the work."""
        if (local, which) not in self.found:
            ranks = self.ms("time_share", local, which)
            self.found[local, which] = ranks and max(ranks)
        return self.found[local, which]


def over_ranks(found: list[Figures]) -> Figures:
    """The slowest rank's time of each window, and the largest memory."""
    memory = [each["gib"] for each in found if each["gib"] is not None]
    slowest = {key: [max(times) for times in zip(*(each[key] for each in found), strict=True)] for key in TIMES}
    return slowest | {"gib": max(memory, default=None)}


TIMES = ("ahead", "synchronised")
