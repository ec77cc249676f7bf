"""bench=memory: the most memory that one attention takes on any rank, as the ring grows and each rank's tokens stay.

Memory that is flat in the number of ranks is what lets a sequence grow with them. Counted is what torch's allocator
holds for the call: its inputs, what the forward keeps for the backward, buffers, gradients. Memory that NCCL takes for
itself is not. Beside it stands what the executor said that it would take for other ranks' keys and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..gang import Place
from ..records import circumstances
from ..settings import require
from .cases import describe, shape_of
from .contest import Contest
from .ranks import AcrossRanks, make_crew
from .workers import Failed

__all__ = ["MemoryBench"]

TOKENS = {"cuda": (8192,), "cpu": (64,)}  # on each rank


@dataclass(kw_only=True)
class MemoryBench(AcrossRanks):
    """Which rings, besides which cases and implementations."""

    bench: str = "memory"
    rings: list[int] = field(default_factory=list)  # numbers of ranks; empty: 1, 2, 4, ... up to all

    def __post_init__(self) -> None:
        super().__post_init__()
        require(min(self.rings, default=1) >= 1, "rings", self.rings, "numbers of at least 1")

    def sizes(self, ranks: int) -> list[int]:
        """The rings to measure; all on the first of `ranks` ranks."""
        require(max(self.rings, default=1) <= ranks, "rings", self.rings, f"at most {ranks} ranks: so many there are")
        return self.rings or [*(size for size in (1, 2, 4, 8, 16, 32, 64) if size < ranks), ranks]


def run(settings: MemoryBench, place: Place) -> Iterator[list[dict[str, Any]]]:
    """The records of one ring and case after the other; prints what gets no figure, and why."""
    common = circumstances(place.size) | {"bench": settings.bench}
    for size in settings.sizes(place.size):
        crew = make_crew(place, size, settings.patience)
        try:
            for case in settings.sequences(place.device, size, TOKENS):
                contest = Contest(crew, settings.chosen(place.device), case, settings.seed)
                contest.check()
                yield [common | row for row in weigh(contest, settings.passes)]
                if place.rank == 0:
                    print(f"{describe(case)} on {size} of {place.size} ranks: done", flush=True)
        finally:
            crew.end()


def weigh(contest: Contest, passes: list[str]) -> Iterator[dict[str, Any]]:
    """A row for every implementation that is right, and every pass."""
    for name, each in contest.running.items():
        for which in passes:
            try:
                heaviest = max(contest.ask("weigh", each, which), key=lambda found: found["peak_memory_gib"])
            except Failed as failure:
                contest.exclude(f"{name}, {which}", str(failure))
                continue
            nothing = dict.fromkeys(("median_ms", "tflops_per_gpu", "efficiency"))
            row = {"impl": name} | shape_of(contest.case) | {"pass": which} | nothing
            yield row | {"ranks": contest.crew.size, "kernel": each.kernel} | heaviest
