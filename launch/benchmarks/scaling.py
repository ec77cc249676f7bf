"""bench=scaling: attention across ranks, ours and the peers', on the same inputs in one run.

Every rank holds what it computes against fp64 before anything is timed. Then all implementations take turns in
shuffled order. A figure is the slowest rank's time; the median is over windows of steps that the host issues without
waiting, and `synchronised_ms` is the same with a wait after each step. With P ranks:

    efficiency  = one GPU's time for the whole sequence with the fastest of our kernels / (P x median_ms), where one
                  GPU's time is the harmonic mean of all P GPUs', so that whoever loses nothing has 1
    exposed_ms  = median_ms - the slowest rank's time for its share of the work when all that it needs is there
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..gang import Place
from ..records import circumstances
from ..settings import require
from .across import Across
from .cases import describe
from .contest import Contest
from .ranks import AcrossRanks, make_crew
from .timing import Deadline, Meter

__all__ = ["ScalingBench", "measure"]

TOKENS = {"cuda": (2048, 8192, 32768), "cpu": (64,)}  # on each rank

COMPILING = 20.0  # seconds that anybody may need before the first answer


@dataclass(kw_only=True)
class ScalingBench(AcrossRanks):
    """How long, besides which cases and implementations."""

    bench: str = "scaling"
    rounds: int = 2
    ahead: int = 24  # steps that the host issues before it waits; fewer where they take longer than the budget
    budget_ms: float = 200.0  # for one implementation, pass and way of waiting in one round
    deadline: float | None = None  # seconds after which nothing more is begun; what was measured is kept

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        require(self.ahead >= 1, "ahead", self.ahead, "at least 1 step")
        require(self.budget_ms > 0, "budget_ms", self.budget_ms, "more than 0")
        require(self.parallel.ranks != 1, "parallel.ranks", 1, "at least 2: bench=kernel measures one GPU")


def run(settings: ScalingBench, place: Place) -> Iterator[list[dict[str, Any]]]:
    """The records of one case after the other; prints what gets no figure, and why."""
    return measure(settings.chosen(place.device), settings, place)


def measure(entrants: list[Across], settings: ScalingBench, place: Place) -> Iterator[list[dict[str, Any]]]:
    """For each case, a record for every implementation and pass that gave a right result in time."""
    common = circumstances(place.size) | {"bench": settings.bench}
    patience = settings.patience
    if settings.deadline is not None:  # so that one who does not answer leaves the others time
        patience = min(patience, max(settings.deadline / 2, COMPILING))
    crew = make_crew(place, place.size, patience)
    meter, deadline = Meter(settings.budget_ms, settings.ahead), Deadline(settings.deadline)
    try:
        for case in settings.sequences(place.device, place.size, TOKENS):
            if crew.share(deadline.passed())[0]:
                if place.rank == 0:
                    print(f"{describe(case)} on {place.size}: not measured: the deadline passed", flush=True)
                continue
            began = time.monotonic()
            contest = Contest(crew, entrants, case, settings.seed)
            contest.check()
            checked = time.monotonic()
            yield [common | row for row in contest.take_turns(settings.passes, settings.rounds, meter, deadline)]
            if place.rank == 0:
                took = f"checks {checked - began:.1f} s, times {time.monotonic() - checked:.1f} s"
                print(f"{describe(case)} on {place.size}: {took}", flush=True)
    finally:
        crew.end()
