"""Which records are published: of each case the last run, so that what stands side by side was measured so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..oracle import Case
from ..records import read_records
from .cases import DTYPES
from .masks import mask_fields

__all__ = ["Record", "amount", "case_of", "digest", "latest", "order", "read", "spell", "told"]

Record = Mapping[str, Any]
CASE = ("gpu", "gpus", "batch", "q_heads", "kv_heads", "seq_len", "head_dim", "mask", "dtype", "ranks")
ALONE = {"check": ("kernel", "layout"), "train": ("context", "kernel", "layout", "steps")}  # nothing beside them
PEERS = (
    *("torch-math", "torch-fa2", "torch-cudnn", "fa4"),
    *("allgather", "ulysses", "torch-cp-allgather", "torch-cp-alltoall", "torch-cp-flex"),
    *("ring-flash-attn-ring", "ring-flash-attn-stripe", "ring-flash-attn-zigzag", "ring-flash-attn-llama3"),
)


def read(folder: Path, bench: str) -> list[Record]:
    """The records of a bench that count, in the order of their cases; none if it never ran."""
    path = folder / f"{bench}.jsonl"
    records = latest(read_records(path), ALONE.get(bench, ())) if path.is_file() else []
    return sorted(records, key=place) if bench == "kernel" else records


def place(record: Record) -> tuple[Any, ...]:
    """Where a case stands among others: causal ones first, large heads first, then by length."""
    return record["mask"] != "causal", -record["head_dim"], record["batch"], record["seq_len"]


def latest(records: Sequence[Record], also: Sequence[str] = ()) -> list[Record]:
    """Of each case, the records of the last run that has it; what differs in `also` is another case.

    Example:
        >>> latest([{"seq_len": 8, "run": "a"}, {"seq_len": 8, "run": "b"}, {"seq_len": 9, "run": "a"}])
        [{'seq_len': 8, 'run': 'b'}, {'seq_len': 9, 'run': 'a'}]
    """

    def case(record: Record) -> tuple[Any, ...]:
        return tuple(record.get(key) for key in (*CASE, *also))

    last = {case(record): record["run"] for record in records}
    return [record for record in records if last[case(record)] == record["run"]]


def digest(records: Iterable[Record]) -> str:
    """A short name of exactly these records."""
    return hashlib.sha256(json.dumps(list(records), sort_keys=True).encode()).hexdigest()[:12]


def told(records: Sequence[Record]) -> str:
    """Where and when they were measured."""
    facts = {
        "": [f"{record['gpu']}" for record in records],
        "torch ": [record["torch"] for record in records],
        "Triton ": [record["triton"] for record in records],
        "commit ": [record["commit"] + ("+" if record["dirty"] else "") for record in records],
        "on ": [record["date"] for record in records],
    }
    return "; ".join(name + ", ".join(dict.fromkeys(values)) for name, values in facts.items())


def order(names: Iterable[str]) -> list[str]:
    """Implementations as they are listed everywhere: ours first, then the peers."""
    distinct = dict.fromkeys(names)
    ours = [name for name in distinct if name.startswith("ringattn-")]
    known = [name for name in PEERS if name in distinct]
    return [*ours, *known, *(name for name in distinct if name not in ours and name not in known)]


def case_of(record: Record) -> Case:
    """What was measured, as far as its operations go."""
    shape = {key: record[key] for key in ("seq_len", "batch", "q_heads", "kv_heads", "head_dim")}
    return Case(**shape, dtype=DTYPES[record["dtype"]], **mask_fields(record["mask"], record["seq_len"]))


def amount(tokens: int) -> str:
    """Tokens in few characters.

    Example:
        >>> amount(32768), amount(1000), amount(131072)
        ('32k', '1000', '128k')
    """
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def spell(record: Record) -> str:
    """A case in a few words.

    Example:
        >>> spell({"mask": "none", "seq_len": 16384, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "batch": 1})
        'no mask, 16k, 32:8 heads of 128'
        >>> spell({"mask": "causal", "seq_len": 500, "q_heads": 4, "kv_heads": 4, "head_dim": 64, "batch": 2})
        'causal, 2 x 500, 4:4 heads of 64'
    """
    mask = "no mask" if record["mask"] == "none" else record["mask"]
    batch = f"{record['batch']} x " if record["batch"] > 1 else ""
    length, heads = amount(record["seq_len"]), f"{record['q_heads']}:{record['kv_heads']} heads"
    return f"{mask}, {batch}{length}, {heads} of {record['head_dim']}"
