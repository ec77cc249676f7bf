"""One case across ranks: who computes it right, and how fast, with what that is compared with."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import chain, product
from statistics import fmean, harmonic_mean, median
from typing import Any, NamedTuple

from ringattn.kernels.registry import KERNELS

from ..oracle import Case
from .across import Across, busiest
from .cases import describe, shape_of, tera_operations
from .crew import Crew
from .timing import Deadline, Meter
from .torch_kernels import BY_TORCH
from .workers import Failed

__all__ = ["Contest", "over_ranks"]

TIMES = ("ahead", "synchronised")
Figures = dict[str, Any]
Turn = tuple[str, Any, str]  # what the stations are asked for, of what, and the pass
Answers = dict[Turn, list[list[Any]]]  # of each turn, what the ranks answered in each round


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
        """Times everybody and, among them, what they are compared with, in another order each round, until all rounds
        are over or the deadline is; what others are compared with once in any case."""
        answers: Answers = {}
        order = random.Random(self.seed)
        for _ in range(rounds):
            turns: list[Turn] = [("time", name, which) for name in self.running for which in passes]
            others = (turn for each in self.running.values() for which in passes for turn in references(each, which))
            turns += dict.fromkeys(others)
            order.shuffle(turns)
            for turn in turns:
                spare = turn[0] == "time" or turn in answers
                late = spare and self.crew.share(deadline.passed())[0]
                found = None if late else self.time(turn, meter)
                if found is not None:
                    answers.setdefault(turn, []).append(found)
        rows = []
        for name, which in product(list(self.running), passes):
            if ("time", name, which) in answers:
                rows.append(self.row(self.running[name], which, answers))
            else:
                self.exclude(f"{name}, {which}", "the deadline passed")
        return rows

    def time(self, turn: Turn, meter: Meter) -> list[Any] | None:
        """What the ranks measured, or None if somebody failed, who then is out."""
        command, subject, which = turn
        if command == "time" and subject not in self.running:
            return None  # it failed earlier in this round
        try:
            return self.ask(command, self.running[subject] if command == "time" else subject, which, meter)
        except Failed as failure:
            self.exclude(f"{subject}, {command}, {which}", str(failure))
            if command == "time":
                del self.running[subject]
            return None

    def row(self, each: Across, which: str, answers: Answers) -> dict[str, Any]:
        """A measurement in the fields of a record."""
        rounds = [over_ranks(found) for found in answers["time", each.name, which]]
        ahead = [ms for found in rounds for ms in found["ahead"]]
        synchronised = [ms for found in rounds for ms in found["synchronised"]]
        middle, ranks = median(ahead), self.crew.size
        alone = alone_on_a_gpu(which, answers)
        share = self.share(each, which, answers)
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
                "efficiency": alone.ms and alone.ms / (ranks * middle),
                "clock_mhz": clock(rounds),
                "one_gpu_ms": alone.ms,
                "one_gpu_ms_each": alone.each,
                "one_gpu_clock_mhz": alone.mhz,
                "one_gpu_impl": alone.kernel and f"ringattn-{alone.kernel}",
                "ranks": ranks,
                "kernel": each.kernel,
                "peak_memory_gib": rounds[0]["gib"],
            }
            | rounds[0]["expects"]
        )

    def share(self, each: Across, which: str, answers: Answers) -> float | None:
        """The slowest rank's time for its share of the work.

        Torch's kernels take no segments: theirs is the time of the whole sequence, in proportion to the pairs.
        """
        turn = next((turn for turn in references(each, which) if turn[0] != "time_alone"), None)
        if turn not in answers:
            return None
        ms = max(each_rank(answers[turn]))
        return ms if turn[0] == "time_share" else ms * busiest(each.local, self.case, self.crew.size)


def references(each: Across, which: str) -> list[Turn]:
    """What an implementation is compared with: one GPU's time for the whole sequence, and that for its share."""
    if each.kernel not in KERNELS:
        return []
    share = ("time_torch", each.kernel, which) if each.kernel in BY_TORCH else ("time_share", each.local, which)
    return [("time_alone", each.kernel, which), share]


class Alone(NamedTuple):
    """One GPU's time for the whole sequence with the fastest of our kernels, if any was timed: the harmonic mean of all
    GPUs', the mean of their clocks, and every GPU's time."""

    ms: float | None = None
    mhz: float | None = None
    kernel: str | None = None
    each: list[float] | None = None


def alone_on_a_gpu(which: str, answers: Answers) -> Alone:
    """GPUs of a kind differ by some percent, and P of them wait for the slowest. What they would do if nobody waited is
    the sum of what each does alone."""
    known = []
    for (what, kernel, passes), rounds in answers.items():
        if (what, passes) == ("time_alone", which):
            each = each_rank(rounds)
            known.append(Alone(harmonic_mean(each), clock(chain.from_iterable(rounds)), kernel, each))
    return min(known, key=lambda alone: alone.ms, default=Alone())


def each_rank(rounds: list[list[Figures]]) -> list[float]:
    """The median of each rank.

    Example:
        >>> each_rank([[{"ahead": [1.0, 2.0]}, {"ahead": [5.0]}], [{"ahead": [1.0, 2.0]}, {"ahead": [5.0]}]])
        [1.5, 5.0]
    """
    return [median(ms for found in rank for ms in found["ahead"]) for rank in zip(*rounds, strict=True)]


def clock(found: Iterable[Figures]) -> float | None:
    """The mean clock, if it is known."""
    known = [each["mhz"] for each in found if each["mhz"] is not None]
    return fmean(known) if known else None


def over_ranks(found: list[Figures]) -> Figures:
    """The slowest rank's time of each window, the largest memory and the slowest clock; what is expected is the same
    everywhere."""
    memory = [each["gib"] for each in found if each["gib"] is not None]
    clocks = [each["mhz"] for each in found if each["mhz"] is not None]
    slowest = {key: [max(times) for times in zip(*(each[key] for each in found), strict=True)] for key in TIMES}
    most = {"gib": max(memory, default=None), "mhz": min(clocks, default=None)}
    return slowest | most | {"expects": found[0]["expects"]}
