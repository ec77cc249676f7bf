"""bench=scaling: attention across ranks, ours and the peers', on the same inputs in one run.

Every rank holds what it computes against fp64 before anything is timed. Then all implementations take turns in
shuffled order. A figure is the slowest rank's time; the median is over windows of steps that the host issues without
waiting, and `synchronised_ms` is the same with a wait after each step. With P ranks:

    efficiency  = one GPU's time for the whole sequence with the fastest of our kernels / (P x median_ms)
    exposed_ms  = median_ms - the time of one rank's share of the work when all that it needs is there
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..gang import Place
from ..oracle import Case
from ..records import circumstances
from ..settings import Parallel, require, require_one_of
from .across import Across, ours_across
from .baselines import AllGather, Ulysses
from .cases import DTYPES, MASKS, describe
from .contest import Contest
from .crew import Crew
from .kernel import SPECIFICATION
from .peers import VARIANTS, RingFlashAttention, TorchContextParallel
from .station import Station
from .timing import Meter
from .workers import preload

__all__ = ["ScalingBench", "across_implementations", "measure"]

PASSES = ("forward", "forward+backward")
TOKENS = {"cuda": (2048, 8192, 32768), "cpu": (64,)}  # on each rank


def across_implementations(peer_kernel: str, causal: bool) -> dict[str, Across]:
    """All that this bench knows, by name: ours first, then the peers over a kernel of torch."""
    peers = [
        *(TorchContextParallel(rotation, peer_kernel, causal) for rotation in ("allgather", "alltoall")),
        *(RingFlashAttention(variant, peer_kernel) for variant in VARIANTS),
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
    return measure(settings.chosen(place.device), settings, place)


def measure(entrants: list[Across], settings: ScalingBench, place: Place) -> Iterator[list[dict[str, Any]]]:
    """For each case, a record for every implementation and pass that gave a right result in time."""
    common = circumstances(place.size) | {"bench": settings.bench}
    preload(Station.__module__, *(["torch._dynamo"] if place.device.type == "cpu" else []))  # it may touch a GPU
    crew = Crew(Station, place, place.size, settings.patience)
    try:
        for case in settings.cases(place.device, place.size):
            contest = Contest(crew, entrants, case, settings.seed)
            began = time.monotonic()
            contest.check()
            checked = time.monotonic()
            yield [
                common | row
                for row in contest.take_turns(
                    settings.passes, settings.rounds, Meter(settings.budget_ms, settings.ahead)
                )
            ]
            if place.rank == 0:
                took = f"checks {checked - began:.1f} s, times {time.monotonic() - checked:.1f} s"
                print(f"{describe(case)} on {place.size}: {took}", flush=True)
    finally:
        crew.end()
