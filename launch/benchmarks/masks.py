"""Masks by the names that records give them: `causal`, `none`, and what `make_plan` offers besides.

window-4096        causal, a query sees the last 4096 keys, its own among them
packed-lognormal   causal within documents packed end to end, their lengths drawn from a log-normal distribution:
                   4096 tokens on average before any is cut at 32768, a quarter of the sequence where that is less
"""

from __future__ import annotations

import math
import random
import re
from inspect import signature
from itertools import pairwise
from typing import Any

from ringattn.plan import make_plan

from ..oracle import Case

__all__ = ["PACKED", "covers", "lognormal_documents", "mask_fields", "mask_name", "pairs"]

DENSE = {"causal": True, "none": False}
PACKED, WINDOW = "packed-lognormal", re.compile(r"window-([1-9]\d*)")
MEAN, LONGEST, SPREAD = 4096, 32768, 1.0  # of documents, in tokens; of the logarithm
SEED = 0


def covers(name: str) -> bool:
    """Whether a name is one of a mask, and this package computes it."""
    options = signature(make_plan).parameters
    needed = {"cu_seqlens"} if name == PACKED else {"window_size"} if WINDOW.fullmatch(name) else set()
    return needed <= set(options) and (bool(needed) or name in DENSE)


def mask_fields(name: str, seq_len: int) -> dict[str, Any]:
    """What a `Case` of that mask and length is told."""
    if name == PACKED:
        return {"causal": True, "documents": lognormal_documents(seq_len)}
    window = WINDOW.fullmatch(name)
    return {"causal": True, "window": int(window[1])} if window else {"causal": DENSE[name]}


def mask_name(case: Case) -> str:
    """The inverse of `mask_fields`."""
    if case.documents is not None:
        return PACKED
    if case.window is not None:
        return f"window-{case.window}"
    return "causal" if case.causal else "none"


def lognormal_documents(seq_len: int) -> tuple[int, ...]:
    """cu_seqlens of documents that fill a sequence, the same wherever it is asked for.

    Example:
        >>> lognormal_documents(40)
        (0, 5, 11, 23, 28, 40)
    """
    draw, mean = random.Random(SEED), min(MEAN, max(seq_len // 4, 1))
    bounds = [0]
    while bounds[-1] < seq_len:
        length = int(draw.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD))
        bounds.append(min(bounds[-1] + min(max(length, 1), LONGEST), seq_len))
    return tuple(bounds)


def pairs(case: Case) -> float:
    """Pairs of a query and a key that count as work; of a square under a causal mask, half.

    Example:
        >>> pairs(Case(100)), pairs(Case(100, window=10)), pairs(Case(100, documents=(0, 60, 100)))
        (5000.0, 950.0, 2600.0)
    """
    if not case.causal:
        return float(case.seq_len**2)
    bounds = case.documents or (0, case.seq_len)
    lengths = [end - start for start, end in pairwise(bounds)]
    hidden = [0 if case.window is None else max(length - case.window, 0) for length in lengths]
    return sum(length**2 - beyond**2 for length, beyond in zip(lengths, hidden, strict=True)) / 2
