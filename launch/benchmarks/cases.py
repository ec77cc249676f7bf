"""What is measured: shapes, passes, and how many operations each counts for."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from ..oracle import Case
from ..settings import require, require_one_of

__all__ = ["DTYPES", "MASKS", "PASSES", "describe", "mask_of", "matching", "named_case", "shape_of", "tera_operations"]

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASKS = {"causal": True, "none": False}
PASSES = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}  # in forwards, arXiv:2307.08691, section 4.1
T = TypeVar("T")
SPELLING = re.compile(r"(\d+)/(\d+):(\d+)/(\d+)/(\d+)/([\w-]+)")


def named_case(text: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The case that `batch/q_heads:kv_heads/head_dim/seq_len/mask` spells.

    Raises:
        ValueError: it spells none; the message shows one that would.

    Example:
        >>> named_case("1/32:8/128/32768/causal")._replace(dtype=None)
        Case(seq_len=32768, batch=1, q_heads=32, kv_heads=8, head_dim=128, causal=True, dtype=None)
    """
    found = SPELLING.fullmatch(text)
    if found is None:
        raise ValueError(
            f"cases={text}: expected batch/q_heads:kv_heads/head_dim/seq_len/mask: 1/32:8/128/32768/causal"
        )
    batch, q_heads, kv_heads, head_dim, seq_len = (int(number) for number in found.groups()[:5])
    require(min(batch, q_heads, kv_heads, head_dim, seq_len) >= 1, "cases", text, "numbers of at least 1")
    require(q_heads % kv_heads == 0, "cases", text, f"kv_heads that divide {q_heads}")
    require_one_of("cases: mask", found[6], tuple(MASKS))
    return Case(seq_len, batch, q_heads, kv_heads, head_dim, MASKS[found[6]], dtype)


def matching(key: str, patterns: Sequence[str], known: Mapping[str, T]) -> list[T]:
    """What is known by names that match any of the patterns, each once, in the order of the patterns.

    Raises:
        ValueError: a pattern that nothing matches; the message lists what there is.

    Example:
        >>> matching("implementations", ["b?", "a"], {"a": 1, "b1": 2, "b2": 3})
        [2, 3, 1]
    """
    found: dict[str, T] = {}
    for pattern in patterns:
        names = fnmatch.filter(known, pattern)
        require(bool(names), key, pattern, f"one of {', '.join(known)}, or a pattern such as ringattn-*")
        found |= {name: known[name] for name in names}
    return list(found.values())


def mask_of(case: Case) -> str:
    return "causal" if case.causal else "none"


def describe(case: Case) -> str:
    """The inverse of `named_case`."""
    return f"{case.batch}/{case.q_heads}:{case.kv_heads}/{case.head_dim}/{case.seq_len}/{mask_of(case)}"


def shape_of(case: Case) -> dict[str, Any]:
    """A case in the fields of a record."""
    keys = ("batch", "q_heads", "kv_heads", "seq_len", "head_dim")
    dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    return {key: getattr(case, key) for key in keys} | {"mask": mask_of(case), "dtype": dtype}


def tera_operations(case: Case, which: str) -> float:
    """Floating-point operations of a pass over the whole sequence, in units of 1e12.

    A forward is two products of S^2 pairs, two operations a pair and head dim; a causal mask counts as half of them,
    a backward as two and a half forwards. By that everybody's figures can be compared.

    Example:
        >>> tera_operations(named_case("1/32:8/128/32768/causal"), "forward")
        8.796093022208
    """
    pairs = case.seq_len**2 / (2 if case.causal else 1)
    return PASSES[which] * 4 * case.batch * case.q_heads * case.head_dim * pairs / 1e12
