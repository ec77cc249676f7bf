"""Is attention across ranks right, on this machine and at these shapes? Compares it with fp64 on one rank.

    python -m ringattn.launch.check [key=value ...]
    torchrun --nproc-per-node N -m ringattn.launch.check [key=value ...]

Prints a row for every layout, mask and dtype, and exits with 1 if any of out, dq, dk and dv errs more than twice as
much as the same kernel does on one rank.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

import ringattn
from ringattn.kernels.registry import choose_kernel
from ringattn.layout import LAYOUTS

from . import entry
from .gang import Place
from .oracle import Case, Result, allowed_error, attend_across_ranks, attend_on_one_rank, error, exact, make_inputs
from .packing import log_normal_lengths
from .records import append_records, circumstances
from .report import markdown
from .settings import Parallel, require, require_one_of

__all__ = ["Check", "check"]

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASKS = ("causal", "none", "window", "packed")
SHAPE = ("batch", "seq_len", "q_heads", "kv_heads", "head_dim")
COLUMNS = ["layout", "mask", "dtype", "kernel", "part", "error", "allowed", "result"]


@dataclass(kw_only=True)
class Check:
    """Shapes, and which variants to check; the whole attention matrix of one head group must fit in fp64."""

    batch: int = 1
    seq_len: int = 1021  # the whole sequence; odd, so that no layout divides it
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    layouts: list[str] = field(default_factory=lambda: list(LAYOUTS))
    masks: list[str] = field(default_factory=lambda: list(MASKS))
    dtypes: list[str] = field(default_factory=list)  # empty: fp32 and bf16 on CPUs, bf16 and fp16 on GPUs
    seed: int = 0
    record: str | None = None  # a file of JSON lines to add the results to
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self) -> None:
        for key in ("batch", "q_heads", "kv_heads", "head_dim"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(self.q_heads % self.kv_heads == 0, "kv_heads", self.kv_heads, f"a divisor of q_heads={self.q_heads}")
        for key, names in (("layouts", LAYOUTS), ("masks", MASKS), ("dtypes", DTYPES)):
            for name in getattr(self, key):
                require_one_of(key, name, list(names))


def resolve(config: DictConfig) -> Check:
    """What a composed config asks for."""
    chosen = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Check), config))
    assert isinstance(chosen, Check)
    return chosen


def check(config: DictConfig, folder: Path, place: Place) -> dict[str, Any]:
    """The job of one rank. Rank 0 compares, prints and records; returns how many comparisons failed."""
    chosen = resolve(config)
    dtypes = chosen.dtypes or (["bf16", "fp16"] if place.device.type == "cuda" else ["fp32", "bf16"])
    rows: list[dict[str, Any]] = []
    for layout, mask, dtype in itertools.product(chosen.layouts, chosen.masks, dtypes):
        how = chosen.parallel
        cp = ringattn.ContextParallel(None, layout=layout, kernel=how.kernel, executor=how.executor)
        shape = {key: getattr(chosen, key) for key in SHAPE}
        case = Case(**shape, **mask_fields(mask, chosen.seq_len), dtype=DTYPES[dtype])
        inputs = make_inputs(case, chosen.seed, place.device)
        got = attend_across_ranks(cp, case, inputs)
        if place.rank == 0:
            kernel = choose_kernel(cp.kernel, *inputs[:3]).kernel
            right, alone = exact(case, inputs), attend_on_one_rank(kernel, case, inputs)
            named = {"layout": layout, "mask": mask, "dtype": dtype, "kernel": kernel.name}
            rows += [named | verdict for verdict in compare(got, right, alone)]
    failed = sum(row["result"] != "pass" for row in rows)
    if place.rank == 0:
        report(chosen, rows, failed, place)
    return {"failed": over_all(failed, place)}


def mask_fields(name: str, seq_len: int) -> dict[str, Any]:
    """What a `Case` is told of a mask: windows and documents an eighth of the sequence long, documents on average."""
    eighth = max(seq_len // 8, 1)
    if name == "window":
        return {"window": eighth}
    if name == "packed":
        lengths = log_normal_lengths(np.random.default_rng(0), seq_len, eighth, seq_len, 1.0)
        return {"documents": (0, *np.cumsum(lengths).tolist())}
    return {"causal": name == "causal"}


def compare(got: Result, right: Result, alone: Result) -> list[dict[str, Any]]:
    """A verdict on each part of a result."""
    verdicts = []
    for part, x, expected, baseline in zip(("forward", "dq", "dk", "dv"), got, right, alone, strict=True):
        measured, allowed = error(x, expected), allowed_error(baseline, expected)
        passed = measured <= allowed  # false for NaN
        verdicts.append({"part": part, "error": measured, "allowed": allowed, "result": "pass" if passed else "FAIL"})
    return verdicts


def report(chosen: Check, rows: list[dict[str, Any]], failed: int, place: Place) -> None:
    """The table for the terminal, and the records."""
    shown = [row | {"error": f"{row['error']:.2e}", "allowed": f"{row['allowed']:.2e}"} for row in rows]
    backend = dist.get_backend() if place.size > 1 else "one process"
    print(
        f"{place.size} ranks on {place.device.type} ({place.reason}), {backend}; batch {chosen.batch}, "
        f"{chosen.seq_len} tokens, {chosen.q_heads}:{chosen.kv_heads} heads of {chosen.head_dim}; errors against fp64\n"
    )
    print(markdown(shown, COLUMNS))
    print(f"\n{len(rows) - failed} passed, {failed} failed")
    if chosen.record:
        shape = {key: getattr(chosen, key) for key in SHAPE}
        common = circumstances(place.size) | {"bench": "check", "ranks": place.size, "backend": backend} | shape
        append_records(Path(chosen.record), [common | row for row in rows])


def over_all(failed: int, place: Place) -> int:
    """Rank 0's count, on every rank, so that all exit alike."""
    if place.size == 1:
        return failed
    shared = [failed]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


@hydra.main(version_base="1.3", config_path="pkg://ringattn.conf", config_name="check")
def task(config: DictConfig) -> None:
    if entry.run("ringattn.launch.check:check", config, resolve)["failed"]:
        sys.exit(1)


def main() -> None:
    ConfigStore.instance().store(name="check_schema", node=Check)
    entry.enlist("ringattn.launch.check")
    task()


if __name__ == "__main__":
    main()
