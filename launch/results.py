"""A sweep's table: one row per job in `results.csv`, appended by the parent as each job ends.

A row is there once its job is over, whatever happens to the rest of the sweep. Jobs may bring columns that
earlier ones did not have (the first may have failed before it measured anything), and launchers such as
joblib append from several processes, so an append rewrites the small file under a lock and swaps it in whole.
"""

from __future__ import annotations

import csv
import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["RESULTS", "append_row", "read_rows"]

RESULTS = "results.csv"


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table, oldest first; none if there is no file yet."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Add a row; columns it brings that the table lacks stay empty in earlier rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows: list[Mapping[str, object]] = [*read_rows(path), row]
        columns = dict.fromkeys(column for each in rows for column in each)  # ordered, once each
        aside = path.with_suffix(".tmp")
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
