"""The clock at which a GPU worked, by its own counters.

At its limit of power a GPU slows down by as much as what it does takes more energy for a cycle; so the same work, in as
many cycles, takes longer beside other things that cost energy. Times alone do not tell that from waiting.
"""

from __future__ import annotations

from importlib.util import find_spec
from statistics import fmean, median
from typing import Any

import torch

__all__ = ["Clock"]

PROGRAMS = 264  # two for each multiprocessor of an H200, of which the last one counts


class Clock:
    """Counters at some moments in the course of the compute; empty where there is no NVIDIA GPU or no Triton."""

    def __init__(self, device: torch.device):
        self.device = device
        self.known = device.type == "cuda" and not torch.version.hip and find_spec("triton") is not None
        self.marks: list[torch.Tensor] = []
        self.mark()  # compiles
        self.marks.clear()

    def mark(self) -> None:
        """Reads the counters once the compute has come here."""
        if self.known:
            from .clock_kernel import clock_kernel

            launch: Any = clock_kernel[(PROGRAMS,)]
            counts = torch.zeros(PROGRAMS, 3, dtype=torch.int64, device=self.device)
            launch(counts, num_warps=1)
            self.marks.append(counts)

    def mhz(self) -> float | None:
        """The mean over stretches, each between two marks."""
        rates = [
            rate(*(mark.tolist() for mark in pair)) for pair in zip(self.marks[::2], self.marks[1::2], strict=True)
        ]
        return fmean(rates) if rates else None


def rate(begin: list[list[int]], end: list[list[int]]) -> float:
    """MHz between two readings [program, (multiprocessor, cycles, nanoseconds)], of the median multiprocessor.

    Example:
        >>> rate([[0, 100, 0], [1, 7, 0]], [[1, 2991, 1990], [1, 3007, 2000], [2, 5, 9]])
        1500.0
    """
    first, last = ({number: counts for number, *counts in reading} for reading in (begin, end))
    return median(1e3 * (last[n][0] - first[n][0]) / (last[n][1] - first[n][1]) for n in first.keys() & last.keys())
