"""Documents of realistic lengths, packed end to end into one sequence: for training, checks and tables.

Lengths are log-normal, as those of text are: many short, few very long. The last document is cut where the sequence
ends, so packed sequences hold no padding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["LENGTHS", "log_normal_lengths", "packed"]


def log_normal_lengths(draw: np.random.Generator, total: int, mean: float, longest: int, spread: float) -> np.ndarray:
    """Lengths that add up to `total` tokens: int64.

    Args:
        mean: of the distribution, before its tail is cut at `longest`.
        spread: standard deviation of the logarithm.
    """
    lengths: list[np.ndarray] = []
    while sum(int(part.sum()) for part in lengths) < total:
        drawn = draw.lognormal(np.log(mean) - spread**2 / 2, spread, max(16, round(total / mean)))
        lengths.append(np.clip(drawn, 1, longest).astype(np.int64))
    return cut_at(np.concatenate(lengths), total)


def cut_at(lengths: np.ndarray, total: int) -> np.ndarray:
    """The first of the lengths, `total` tokens in all."""
    ends = np.minimum(np.cumsum(lengths), total)
    lengths = np.diff(ends, prepend=0)
    return lengths[lengths > 0]


def log_normal(total: int, draw: np.random.Generator) -> np.ndarray:
    """A mean of 4096 tokens, 32768 at most."""
    return log_normal_lengths(draw, total, 4096, 32768, 1.0)


def web(total: int, draw: np.random.Generator) -> np.ndarray:
    """As pages of the web are: half of them below 160 tokens, some of them books."""
    return log_normal_lengths(draw, total, 800, 131072, 1.8)


def giant(total: int, draw: np.random.Generator) -> np.ndarray:
    """One document of half the tokens, somewhere among documents of 64."""
    tiny = np.full(total // 2 // 64 + 1, 64)
    return cut_at(np.insert(tiny, draw.integers(len(tiny)), total // 2), total)


def equal(total: int, draw: np.random.Generator) -> np.ndarray:
    """4096 tokens each."""
    return cut_at(np.full(total // 4096 + 1, 4096), total)


LENGTHS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "log-normal": log_normal,
    "web": web,
    "giant": giant,
    "equal": equal,
}


def packed(name: str, total: int, seed: int = 0) -> np.ndarray:
    """cu_seqlens of a sequence of `total` tokens packed with documents of such lengths: int64.

    Example:
        >>> packed("equal", 10000).tolist()
        [0, 4096, 8192, 10000]
    """
    lengths = LENGTHS[name](total, np.random.default_rng((seed, total)))
    return np.concatenate(([0], np.cumsum(lengths)))
