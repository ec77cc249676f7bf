"""What is measured: shapes, passes, and how many operations each counts for."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from ..oracle import Case
from ..settings import require
from .masks import PACKED, covers, mask_fields, mask_name, pairs

__all__ = ["DTYPES", "PASSES", "describe", "matching", "named_case", "require_mask", "shape_of", "tera_operations"]

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}  # in forwards, arXiv:2307.08691, section 4.1
T = TypeVar("T")
SPELLING = re.compile(r"(\d+)/(\d+):(\d+)/(\d+)/(\d+)/([\w-]+)")


def named_case(text: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The case that `batch/q_heads:kv_heads/head_dim/seq_len/mask` spells.

    Raises:
        ValueError: it spells none; the message shows one that would.

    Example:
        >>> case = named_case("1/32:8/128/32768/causal")
        >>> case.batch, case.q_heads, case.kv_heads, case.head_dim, case.seq_len, case.causal
        (1, 32, 8, 128, 32768, True)
    """
    found = SPELLING.fullmatch(text)
    if found is None:
        raise ValueError(
            f"cases={text}: expected batch/q_heads:kv_heads/head_dim/seq_len/mask: 1/32:8/128/32768/causal"
        )
    batch, q_heads, kv_heads, head_dim, seq_len = (int(number) for number in found.groups()[:5])
    require(min(batch, q_heads, kv_heads, head_dim, seq_len) >= 1, "cases", text, "numbers of at least 1")
    require(q_heads % kv_heads == 0, "cases", text, f"kv_heads that divide {q_heads}")
    require_mask("cases: mask", found[6])
    return Case(seq_len, batch, q_heads, kv_heads, head_dim, dtype=dtype, **mask_fields(found[6], seq_len))


def require_mask(key: str, name: str) -> None:
    """Raises ValueError for a mask that this package does not compute."""
    known = [each for each in ("causal", "none", PACKED, "window-4096") if covers(each)]
    require(covers(name), key, name, f"one of {', '.join(known)}")


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


def describe(case: Case) -> str:
    """The inverse of `named_case`."""
    return f"{case.batch}/{case.q_heads}:{case.kv_heads}/{case.head_dim}/{case.seq_len}/{mask_name(case)}"


def shape_of(case: Case) -> dict[str, Any]:
    """A case in the fields of a record."""
    keys = ("batch", "q_heads", "kv_heads", "seq_len", "head_dim")
    dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    return {key: getattr(case, key) for key in keys} | {"mask": mask_name(case), "dtype": dtype}


def tera_operations(case: Case, which: str) -> float:
    """Floating-point operations of a pass over the whole sequence, in units of 1e12.

    A forward is two products over all pairs, two operations a pair and head dim; a causal mask counts as half of S^2
    pairs, a backward as two and a half forwards. By that everybody's figures can be compared.

    Example:
        >>> tera_operations(named_case("1/32:8/128/32768/causal"), "forward")
        8.796093022208
    """
    return PASSES[which] * 4 * case.batch * case.q_heads * case.head_dim * pairs(case) / 1e12
