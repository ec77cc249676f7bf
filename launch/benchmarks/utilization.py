"""bench=utilization: where the time goes, on one GPU and between ranks.

One GPU: each local implementation is checked and timed as bench=kernel does, then one call of it is profiled. Beside
its counters stand the two ceilings of this machine, measured here: a large matrix product and a large copy.

Several ranks: the stretches in which each rank computed and communicated in one step, for a picture of the overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from ringattn.preparation import EXECUTORS

from ..gang import Place
from ..oracle import Case
from ..records import circumstances
from ..settings import require
from . import counters, kernel
from .across import Across
from .cases import DTYPES, describe, matching, named_case, shape_of
from .contest import Contest
from .desk import Desk
from .implementations import local_implementations
from .ranks import AcrossRanks, make_crew
from .timing import samples_ms
from .workers import Failed, preload

__all__ = ["UtilizationBench", "ceilings"]

TOKENS = {"cuda": (8192,), "cpu": (64,)}  # on each rank, in the timeline
FOLLOWED = {"torch-cp-allgather", "ring-flash-attn-zigzag"}  # the peers in the timeline
SIZES = {"cuda": (8192, 2**31), "cpu": (256, 2**22)}  # of the matrices, rows; and of the copy, bytes


@dataclass(kw_only=True)
class UtilizationBench(AcrossRanks):
    """`cases` and `local` for one GPU; the rest for the timeline."""

    bench: str = "utilization"
    cases: list[str] = field(default_factory=list)  # batch/q_heads:kv_heads/head_dim/seq_len/mask
    local: list[str] = field(default_factory=list)  # empty: all but the specification
    passes: list[str] = field(default_factory=lambda: ["forward+backward"])
    budget_ms: float = 100.0
    rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.cases:
            named_case(text)
        matching("local", self.local, local_implementations())
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        require(self.budget_ms > 0, "budget_ms", self.budget_ms, "more than 0")

    def chosen(self, device: torch.device) -> list[Across]:
        """Unless told: every executor over one kernel and layout, and two peers."""
        if self.implementations:
            return super().chosen(device)
        ours = {f"ringattn-{self.kernel_on(device)}-{executor}-zigzag" for executor in EXECUTORS}
        return [each for each in super().chosen(device) if each.name in ours | FOLLOWED]

    def of_one_gpu(self) -> kernel.KernelBench:
        return kernel.KernelBench(
            cases=self.cases,
            dtype=self.dtype,
            passes=["forward", "backward"],
            implementations=self.local,
            rounds=self.rounds,
            budget_ms=self.budget_ms,
            patience=self.patience,
            seed=self.seed,
        )


def run(settings: UtilizationBench, place: Place) -> Iterator[list[dict[str, Any]]]:
    """The records of one GPU, then those of the timeline."""
    if place.rank == 0:
        yield from profiled(settings, place)
    if place.size > 1:
        yield from timelines(settings, place)


def profiled(settings: UtilizationBench, place: Place) -> Iterator[list[dict[str, Any]]]:
    """For each case, a record of every implementation and pass, with its counters and the ceilings."""
    alone = settings.of_one_gpu()
    preload(Desk.__module__)
    peaks = ceilings(place.device)
    cases = alone.named_cases(place.device)
    for case, records in zip(
        cases, kernel.measure(alone.chosen(place.device), cases, alone, place.device), strict=True
    ):
        counted = counters_of(records, case, settings, place.device)
        for record in records:
            call = record["impl"], record["pass"]
            record |= {"bench": settings.bench} | peaks | dict.fromkeys(counters.FIELDS) | counted.get(call, {})
            record["peak_share"] = record["tflops_per_gpu"] / peaks["peak_tflops"]
        yield records


def counters_of(
    records: list[dict[str, Any]], case: Case, settings: UtilizationBench, device: torch.device
) -> dict[counters.Call, counters.Counters]:
    """What Nsight Compute counts of those that were timed; prints whom it does not count, and why."""
    names = list(dict.fromkeys(record["impl"] for record in records))
    found, reason = {}, "Nsight Compute did not come to it"
    try:
        if device.type != "cuda":
            raise counters.Missing("a CPU has none")
        dtype = records[0]["dtype"] if records else ""
        found = counters.count(names, describe(case), dtype, settings.seed, settings.patience)
    except counters.Missing as missing:
        reason = str(missing)
    for record in records:
        if (record["impl"], record["pass"]) not in found:
            print(f"{describe(case)}: no counters for {record['impl']}, {record['pass']}: {reason}", flush=True)
    return found


def ceilings(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large matrix product in bf16 (fp32 on CPUs), GB/s of a large copy, read and written."""
    rows, size = SIZES[device.type]
    dtype = DTYPES["bf16" if device.type == "cuda" else "fp32"]
    a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = median(samples_ms(lambda: a @ b, device, 100, 5, 50))
    copy = median(samples_ms(lambda: target.copy_(source), device, 100, 5, 50))
    return {"peak_tflops": 2 * rows**3 / product / 1e9, "peak_gbs": 2 * size / copy / 1e6}


def timelines(settings: UtilizationBench, place: Place) -> Iterator[list[dict[str, Any]]]:
    """For each case, a record of every implementation and pass: [rank, what, start, end] in microseconds."""
    common = circumstances(place.size) | {"bench": settings.bench}
    nothing = dict.fromkeys(("median_ms", "tflops_per_gpu", "efficiency", "peak_memory_gib"))
    crew = make_crew(place, place.size, settings.patience)
    try:
        for case in settings.sequences(place.device, place.size, TOKENS):
            contest = Contest(crew, settings.chosen(place.device), case, settings.seed)
            contest.check()
            rows = []
            for name, each in contest.running.items():
                for which in settings.passes:
                    try:
                        seen = contest.ask("follow", each, which)
                    except Failed as failure:
                        contest.exclude(f"{name}, {which}", str(failure))
                        continue
                    told = {"impl": name, "pass": which, "ranks": place.size, "kernel": each.kernel}
                    rows.append(common | told | shape_of(case) | nothing | {"timeline": shared_clock(seen)})
            yield rows
    finally:
        crew.end()


def shared_clock(seen: list[list[tuple[str, float, float, str]]]) -> list[tuple[int, str, float, float]]:
    """All ranks' stretches, from the first of them on."""
    zero = min((start for stretches in seen for _, start, _, _ in stretches), default=0.0)
    return [
        (rank, what, round(start - zero, 1), round(end - zero, 1))
        for rank, stretches in enumerate(seen)
        for what, start, end, _ in stretches
    ]
