"""Measured rates of kernels, links and the host, which the cost model adds up.

All are of H200s on NVLink, but for "network", which is what one 400 Gb/s port per GPU is known to carry.
"""

from __future__ import annotations

from itertools import pairwise
from math import log
from typing import NamedTuple

__all__ = ["HOST", "KERNEL_RATES", "LAUNCH", "LINKS", "MEETING", "MEMORY", "START", "KernelRate", "beside", "seconds"]

Curve = tuple[tuple[float, float], ...]  # (bytes, bytes a second), from small to large


class KernelRate(NamedTuple):
    """Operations a second of long sequences, forward and backward."""

    forward: float
    backward: float


# Measured on an H200, bf16, 32:8 heads, head dim 128, causal: docs/benchmarks/kernel.jsonl, scaling.jsonl.
KERNEL_RATES = {
    "hopper": KernelRate(680e12, 600e12),
    "triton": KernelRate(510e12, 425e12),
    "cudnn": KernelRate(589e12, 537e12),
    "aten": KernelRate(345e12, 322e12),
    "reference": KernelRate(10e12, 10e12),
}
MB = 1e6
LINKS: dict[str, Curve] = {  # NVLink: two H200s, NCCL on as many channels as `transport.p2p` takes
    "narrow p2p": ((1 * MB, 20e9), (4.2 * MB, 45e9), (33.5 * MB, 56e9), (134 * MB, 75e9)),
    "p2p": ((1 * MB, 23e9), (4.2 * MB, 89e9), (16.8 * MB, 131e9), (67 * MB, 157e9), (268 * MB, 304e9)),
    "all-gather": ((1 * MB, 26e9), (4.2 * MB, 101e9), (16.8 * MB, 167e9), (67 * MB, 203e9), (268 * MB, 215e9)),
    "copy engine": ((1 * MB, 73e9), (4.2 * MB, 205e9), (16.8 * MB, 331e9), (67 * MB, 362e9), (268 * MB, 371e9)),
    "network": ((1 * MB, 15e9), (4.2 * MB, 32e9), (16.8 * MB, 42e9), (67 * MB, 46e9)),  # not measured
}
LAUNCH = 25e-6  # seconds to fill and drain the GPU
START = 10e-6  # seconds to fill it
MEETING = 10e-6  # seconds for ranks to hear from each other on the GPU
MEMORY = 3.5e12  # bytes a second to and from memory
# How much slower attention is beside such traffic.
BESIDE = {"narrow p2p": 1.05, "p2p": 1.3, "copy engine": 1.09, "network": 1.05}
# Seconds of the host; a backward begins in a thread of torch's that has to wake up.
HOST = {
    "call": 50e-6,
    "backward": 600e-6,
    "launch": 35e-6,
    "travel": 40e-6,
    "copy": 8e-6,
    "message": 150e-6,
    "replay": 120e-6,
}


def seconds(link: str, nbytes: float) -> float:
    """To carry so many bytes: what was measured, interpolated in logarithms."""
    curve = LINKS[link]
    if nbytes <= curve[0][0]:
        return curve[0][0] / curve[0][1] if nbytes else 0.0
    for (small, slow), (large, fast) in pairwise(curve):
        if nbytes <= large:
            share = log(nbytes / small) / log(large / small)
            return (small / slow) ** (1 - share) * (large / fast) ** share
    return nbytes / curve[-1][1]


def beside(compute: float, travel: float, link: str) -> float:
    """Both at once: attention is slower as long as the traffic lasts."""
    slowed = compute + min(travel, compute) * (1 - 1 / BESIDE[link])
    return max(slowed, travel)
