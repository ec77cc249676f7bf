"""Time of one call, alone or among ranks: CUDA events on GPUs, the host's clock on CPUs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .clock import Clock

__all__ = ["FLUSH_BYTES", "Deadline", "Meter", "hold", "samples_ms", "slowest"]

# Written before each timed call. It empties every cache, and takes long enough (some 0.3 ms) for the host to have
# issued the call that follows, so that short kernels are timed and not their launches.
FLUSH_BYTES = 2**30
WARM_UP_MS = 50.0
STEADY_MS = 150.0  # among ranks; within some 100 ms a GPU at its limit of power has found its clock
HOLD_CYCLES = 2_000_000  # about a millisecond


def samples_ms(
    work: Callable[[], object], device: torch.device, budget_ms: float, least: int, most: int
) -> list[float]:
    """Milliseconds of each of some calls: as many as fit the budget, within bounds, after a warm-up."""
    if device.type != "cuda":
        return host_samples(work, budget_ms, least, most)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    first = device_samples(work, flush, 1)
    times = count(budget_ms, first[0], least, most)
    if first[0] > WARM_UP_MS:  # too long to be thrown away, and warm before it ends
        return first + device_samples(work, flush, times - 1)
    for _ in range(min(int(WARM_UP_MS / first[0]), most)):
        work()
    return device_samples(work, flush, times)


def count(budget_ms: float, estimate: float, least: int, most: int) -> int:
    return min(max(int(budget_ms / max(estimate, 1e-3)), least), most)


def device_samples(work: Callable[[], object], flush: torch.Tensor, times: int) -> list[float]:
    """The device's own time of each call; the host runs ahead of it."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for start, end in marks:
        flush.zero_()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize(flush.device)
    return [start.elapsed_time(end) for start, end in marks]


def host_samples(work: Callable[[], object], budget_ms: float, least: int, most: int) -> list[float]:
    def once() -> float:
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    return [once() for _ in range(count(budget_ms, once(), least, most))]


class Deadline:
    """When to begin nothing more, so that what was measured until then is kept. Starts when made."""

    def __init__(self, seconds: float | None):
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    def passed(self) -> bool:
        return time.monotonic() > self.end


@dataclass(frozen=True)
class Meter:
    """How ranks time a pass together: they start each window at once, and all take as many steps."""

    budget_ms: float  # for the windows of each kind
    ahead: int  # steps that the host issues before it waits
    most: int = 5  # windows
    least: int = 3  # steps

    def measure(self, work: Callable[[], object], device: torch.device) -> dict[str, Any]:
        """`measure_ahead`, and the same with a wait after each step."""
        found = self.measure_ahead(work, device)
        found["synchronised"] = [window_ms(work, device, 1, ahead=False) for _ in range(found["steps"])]
        return found

    def measure_ahead(self, work: Callable[[], object], device: torch.device) -> dict[str, Any]:
        """Milliseconds per step on this rank, the host running ahead; steps of each window, and the GPU's clock."""
        steps, windows = self.plan(work, device)
        clock = Clock(device)
        times = [window_ms(work, device, steps, clock=clock) for _ in range(windows)]
        return {"ahead": times, "steps": steps, "mhz": clock.mhz()}

    def plan(self, work: Callable[[], object], device: torch.device) -> tuple[int, int]:
        """Steps of a window, and windows. Before, a GPU does the same work until it is as warm, and its clock as slow,
        as this work makes them."""
        estimate = slowest(window_ms(work, device, 1))
        if device.type == "cuda":
            window_ms(work, device, math.ceil(STEADY_MS / estimate))
        steps = count(self.budget_ms, estimate, self.least, self.ahead)
        return steps, count(self.budget_ms, steps * estimate, 1, self.most)


def hold(device: torch.device) -> None:
    """Keeps a GPU waiting for a millisecond, so that the host is ahead of it when the work that follows begins."""
    if device.type == "cuda":
        torch.cuda._sleep(HOLD_CYCLES)


def slowest(here: float) -> float:
    """The largest of all ranks' values; a barrier on the way."""
    shared = torch.tensor(here, dtype=torch.float64)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.item()


def window_ms(
    work: Callable[[], object], device: torch.device, steps: int, ahead: bool = True, clock: Clock | None = None
) -> float:
    """Milliseconds per step of some steps in a row that all ranks begin together, the host ahead or not."""
    slowest(0.0)
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(steps):
            work()
        return 1e3 * (time.perf_counter() - start) / steps
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    if ahead:
        hold(device)
    if clock is not None:
        clock.mark()
    begin.record()
    for _ in range(steps):
        work()
    end.record()
    if clock is not None:
        clock.mark()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / steps
