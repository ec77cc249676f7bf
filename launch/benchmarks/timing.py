"""Time of one call: CUDA events on GPUs, the host's clock on CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["FLUSH_BYTES", "samples_ms"]

# Written before each timed call. It empties every cache, and takes long enough (some 0.3 ms) for the host to have
# issued the call that follows, so that short kernels are timed and not their launches.
FLUSH_BYTES = 2**30
WARM_UP_MS = 50.0


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
