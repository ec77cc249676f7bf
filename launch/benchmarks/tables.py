"""Records as tables, in markdown that lines up in a terminal too; a table for each bench."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..report import markdown

__all__ = ["spell_case", "table"]

RIVALS = {"torch-cudnn": "/cuDNN", "torch-fa2": "/FA2"}  # a ratio above 1 is faster than that one
SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "both"}
Record = Mapping[str, Any]
Rows = dict[tuple[Any, ...], dict[str, str]]


def spell_case(record: Record) -> str:
    return "{batch}/{q_heads}:{kv_heads}/{head_dim}/{seq_len}/{mask} {dtype}".format(**record)


def grid(rows: Rows) -> str:
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    return markdown(list(rows.values()), list(columns))


def row_of(rows: Rows, record: Record, *keys: str) -> dict[str, str]:
    """The row that a record belongs to, made when first asked for."""
    case, name = spell_case(record), record["impl"]
    start = {"case": case, "implementation": name} | {key: str(record[key]) for key in keys}
    return rows.setdefault(tuple(start.values()), start)


def kernels(records: Iterable[Record]) -> str:
    """Time, rate, and the ratio of rates to each rival's of the same run."""
    figures = {(spell_case(each), each["impl"], each["pass"]): each for each in records}
    rows: Rows = {}
    for (case, _, which), record in figures.items():
        row, short = row_of(rows, record), SHORT[which]
        row[f"{short} ms"] = f"{record['median_ms']:.3f}"
        row[f"{short} TFLOP/s"] = f"{record['tflops_per_gpu']:.3g}"
        for rival, sign in RIVALS.items():
            other = figures.get((case, rival, which))
            if other is not None:
                row[f"{short} {sign}"] = f"{record['tflops_per_gpu'] / other['tflops_per_gpu']:.2f}"
    return grid(rows)


def scaling(records: Iterable[Record]) -> str:
    """Time with the host running ahead and waiting, rate, efficiency, what communication adds; how many times as fast
    as the best peer of the same run."""
    rows: Rows = {}
    records = list(records)
    best: dict[tuple[str, str], float] = {}
    for record in records:
        if not record["impl"].startswith("ringattn-"):
            key = spell_case(record), record["pass"]
            best[key] = max(best.get(key, 0.0), record["tflops_per_gpu"])
    for record in records:
        row, short = row_of(rows, record, "ranks", "kernel"), SHORT[record["pass"]]
        row[f"{short} ms"] = f"{record['median_ms']:.3f}"
        row[f"{short} waiting"] = f"{record['synchronised_ms']:.3f}"
        expected = record["predicted_ms"]
        row[f"{short} predicted"] = "" if expected is None else f"{expected:.3f} {record['executor']}"
        row[f"{short} exposed"] = "" if record["exposed_ms"] is None else f"{record['exposed_ms']:.3f}"
        row[f"{short} TFLOP/s"] = f"{record['tflops_per_gpu']:.3g}"
        row[f"{short} efficiency"] = "" if record["efficiency"] is None else f"{record['efficiency']:.1%}"
        rival = best.get((spell_case(record), record["pass"]))
        row[f"{short} /peers"] = "" if rival is None else f"{record['tflops_per_gpu'] / rival:.2f}"
    return grid(rows)


def memory(records: Iterable[Record]) -> str:
    """GiB, a column per ring."""
    rows: Rows = {}
    for record in records:
        tokens = record["seq_len"] // record["ranks"]
        start = {"tokens per rank": str(tokens), "implementation": record["impl"], "pass": record["pass"]}
        row = rows.setdefault(tuple(start.values()), start)
        row[f"{record['ranks']} ranks"] = f"{record['peak_memory_gib']:.4g}"
    return grid(rows)


def precision(records: Iterable[Record]) -> str:
    """Error against fp64, a column per part."""
    rows: Rows = {}
    for record in records:
        row_of(rows, record, "ranks")[record["part"]] = f"{record['error']:.2e}"
    return grid(rows)


UTILIZATION = {
    "sm_utilization": "SM",
    "tensor_utilization": "tensor pipes",
    "memory_utilization": "memory bandwidth",
    "l2_hit_rate": "L2 hits",
    "warp_efficiency": "warp efficiency",
    "peak_share": "share of peak",
}


def utilization(records: Iterable[Record]) -> str:
    """The table of the FlashAttention literature, measured; timelines are pictures and have no row."""
    rows: Rows = {}
    for record in records:
        if record["median_ms"] is None:
            continue
        row = row_of(rows, record, "pass")
        row["TFLOP/s"] = f"{record['tflops_per_gpu']:.3g}"
        for field, head in UTILIZATION.items():
            row[head] = "" if record[field] is None else f"{record[field]:.1%}"
    return grid(rows)


TABLES: dict[str, Callable[[Iterable[Record]], str]] = {
    "kernel": kernels,
    "scaling": scaling,
    "memory": memory,
    "precision": precision,
    "utilization": utilization,
}


def table(records: list[dict[str, Any]]) -> str:
    """The table of the bench that the records come from."""
    return TABLES[records[0]["bench"]](records)
