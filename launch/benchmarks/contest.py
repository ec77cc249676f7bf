"""One case across ranks: who computes it right, and how fast, with what that is compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from statistics import median
from typing import Any

from ringattn.kernels.registry import KERNELS

from ..oracle import Case
from .across import Across, Local, busiest
from .cases import describe, shape_of, tera_operations
from .crew import Crew
from .timing import Deadline, Meter
from .torch_kernels import BY_TORCH
from .workers import Failed

__all__ = ["Contest", "over_ranks"]

TIMES = ("ahead", "synchronised")
Figures = dict[str, Any]


class Contest:
    """One case, and the implementations that are still in the running for a figure; the same on every rank."""

    def __init__(self, crew: Crew, entrants: list[Across], case: Case, seed: int):
        self.crew, self.case, self.seed = crew, case, seed
        self.running = {each.name: each for each in entrants}
        self.known: int | None = None  # the attempt of the crew that knows this case
        self.learned: int | None = None  # and what is right

    def exclude(self, name: str, reason: str) -> None:
        if self.crew.place.rank == 0:
            print(f"{describe(self.case)} on {self.crew.size}: no figure for {name}: {reason}", flush=True)

    def ask(self, command: str, *arguments: Any) -> list[Any]:
        """Asks a crew that knows the case."""
        if self.known != self.crew.attempt:
            self.crew.ask("load", self.case, self.seed)
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
                return f"wrong on rank {rank}: {faults}"
        return None

    def take_turns(self, passes: Sequence[str], rounds: int, meter: Meter, deadline: Deadline) -> list[dict[str, Any]]:
        """Times everybody, in another order each round, until all rounds are over or the deadline is."""
        samples: dict[tuple[str, str], list[Figures]] = {}
        order = random.Random(self.seed)
        for _ in range(rounds):
            turns = [(name, which) for name in self.running for which in passes]
            order.shuffle(turns)
            for name, which in turns:
                if name not in self.running or self.crew.share(deadline.passed())[0]:
                    continue  # it failed earlier in this round, or there is no time left
                try:
                    found = self.ask("time", self.running[name], which, meter)
                except Failed as failure:
                    self.exclude(name, str(failure))
                    del self.running[name]
                    continue
                samples.setdefault((name, which), []).append(over_ranks(found))
        references, rows = References(self, meter), []
        for name, which in product(list(self.running), passes):
            if (name, which) in samples:
                rows.append(self.row(self.running[name], which, samples[name, which], references))
            else:
                self.exclude(f"{name}, {which}", "the deadline passed")
        return rows

    def row(self, each: Across, which: str, rounds: list[Figures], references: References) -> dict[str, Any]:
        """A measurement in the fields of a record."""
        ahead = [ms for found in rounds for ms in found["ahead"]]
        synchronised = [ms for found in rounds for ms in found["synchronised"]]
        middle, ranks = median(ahead), self.crew.size
        alone, kernel = references.alone(which)
        share = references.share(each.local, which) if each.kernel in KERNELS else None
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
            | rounds[0]["expects"]
        )


class References:
    """What implementations are compared with, measured when first asked for; None where it cannot be."""

    def __init__(self, contest: Contest, meter: Meter):
        self.contest, self.meter = contest, meter
        self.found: dict[Any, float | None] = {}

    def alone(self, which: str) -> tuple[float | None, str | None]:
        """The fastest GPU's time for the whole sequence, and the fastest of our kernels."""
        kernels = {each.kernel: None for each in self.contest.running.values() if each.kernel in KERNELS}
        times = {kernel: self.ms("time_alone", kernel, which, min) for kernel in kernels}
        known = {kernel: ms for kernel, ms in times.items() if ms is not None}
        best = min(known, key=known.__getitem__, default=None)
        return (None, None) if best is None else (known[best], best)

    def share(self, local: Local, which: str) -> float | None:
        """The slowest rank's time for its share of the work.

        Torch's kernels take no segments: theirs is the time of the whole sequence, in proportion to the pairs.
        """
        if local.kernel not in BY_TORCH:
            return self.ms("time_share", local, which, max)
        whole = self.ms("time_torch", local.kernel, which, max)
        return whole and whole * busiest(local, self.contest.case, self.contest.crew.size)

    def ms(self, command: str, subject: Any, which: str, over: Callable[[list[float]], float]) -> float | None:
        """The median on each rank, `over` all ranks."""
        if (subject, which) not in self.found:
            try:
                answers = self.contest.ask(command, subject, which, self.meter)
                self.found[subject, which] = over([median(answer) for answer in answers])
            except Failed as failure:
                self.contest.exclude(f"{command} {subject}, {which}", str(failure))
                self.found[subject, which] = None
        return self.found[subject, which]


def over_ranks(found: list[Figures]) -> Figures:
    """The slowest rank's time of each window, and the largest memory; what is expected is the same everywhere."""
    memory = [each["gib"] for each in found if each["gib"] is not None]
    slowest = {key: [max(times) for times in zip(*(each[key] for each in found), strict=True)] for key in TIMES}
    return slowest | {"gib": max(memory, default=None), "expects": found[0]["expects"]}
