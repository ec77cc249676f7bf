"""Records as a table for the terminal: a row per case and implementation, some columns per pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..report import markdown

__all__ = ["table"]

RIVALS = {"torch-cudnn": "/cuDNN", "torch-fa2": "/FA2"}  # a ratio above 1 is faster than that one
SIDE = {"exposed_ms": "exposed ms", "synchronised_ms": "synchronised ms"}  # beside the time
SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "both"}


def spell_case(record: dict[str, Any]) -> str:
    return "{batch}/{q_heads}:{kv_heads}/{head_dim}/{seq_len}/{mask} {dtype}".format(**record)


def table(records: Iterable[dict[str, Any]]) -> str:
    """Median time, TFLOP/s per GPU, and what else there is of each; in markdown. A rival's ratio is of TFLOP/s, its own
    of the same run."""
    figures = {(spell_case(each), each["impl"], each["pass"]): each for each in records}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for (case, name, which), record in figures.items():
        row = rows.setdefault((case, name), {"case": case, "implementation": name})
        short = SHORT[which]
        row[f"{short} ms"] = f"{record['median_ms']:.3f}"
        row[f"{short} TFLOP/s"] = f"{record['tflops_per_gpu']:.3g}"
        if record["efficiency"] is not None:
            row[f"{short} efficiency"] = f"{record['efficiency']:.1%}"
        for key, head in SIDE.items():
            if record.get(key) is not None:
                row[f"{short} {head}"] = f"{record[key]:.3f}"
        for rival, sign in RIVALS.items():
            other = figures.get((case, rival, which))
            if other is not None:
                row[f"{short} {sign}"] = f"{record['tflops_per_gpu'] / other['tflops_per_gpu']:.2f}"
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    return markdown(list(rows.values()), list(columns))
