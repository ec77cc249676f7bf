"""Tables and plots of what was trained and measured.

    python -m ringattn.launch.report FOLDER         a run, or a sweep
    python -m ringattn.launch.report benchmarks     the committed records, into README.md and docs/benchmarks.md
    python -m ringattn.launch.report plan ...       who would compute what: a table, and a picture; --help says more
    python -m ringattn.launch.report balance        layouts compared, into docs/balance.md

A run's folder (it holds `metrics.jsonl`) gives its losses over time; a sweep's folder (it holds `results.csv`)
a row per job, with what all jobs have in common said once. The table goes to stdout, as markdown; the plot to
`losses.png` in the folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from . import metrics
from .plots import draw_losses
from .results import RESULTS, read_rows

__all__ = ["markdown", "some", "spell"]

PLOT = "losses.png"
BENCHMARKS = "benchmarks"


def spell(value: object) -> str:
    """A table's cell: floats to five digits, the rest on one line.

    Example:
        >>> spell(3.14159265), spell(20000.0), spell("zigzag"), spell(None), spell(12)
        ('3.1416', '20000', 'zigzag', '', '12')
    """
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else " ".join(str(value).split()).replace("|", "\\|")


def number(text: str) -> float | str:
    """A cell of a CSV file as the float it spells, if it spells one."""
    try:
        return float(text)
    except ValueError:
        return text


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as a markdown table that lines up in a terminal too; strings stay as they are."""
    cells = [list(columns), *([spell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def some(steps: Iterable[int], count: int = 12) -> list[int]:
    """At most `count` of the steps, evenly spread, the first and the last among them.

    Example:
        >>> some(range(1, 101), 5)
        [1, 26, 51, 75, 100]
    """
    steps = list(steps)
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def report_run(folder: Path) -> str:
    """Some steps of one run; the plot has them all."""
    records = metrics.read(folder)
    if not records:
        return "nothing measured yet"
    draw_losses({folder.name: records}, folder / PLOT)
    columns = dict.fromkeys(name for record in records.values() for name in record)
    return markdown([records[step] for step in some(records)], list(columns))


def report_sweep(folder: Path) -> str:
    """A row per job; what all jobs have in common is said once, below."""
    rows = read_rows(folder / RESULTS)
    columns = dict.fromkeys(column for row in rows for column in row)
    shared = {column for column in columns if len(rows) > 1 and len({row[column] for row in rows}) == 1}
    measured = {
        label(folder / row["folder"], shared): metrics.read(folder / row["folder"])
        for row in rows
        if (folder / row["folder"] / metrics.METRICS).is_file()
    }
    runs = {name: records for name, records in measured.items() if records}  # a job may fail before its first step
    if runs:
        draw_losses(runs, folder / PLOT)
    numbers = [{column: number(cell) for column, cell in row.items()} for row in rows]
    text = markdown(numbers, [column for column in columns if column not in shared])
    common = ", ".join(f"{column}={rows[0][column]}" for column in columns if column in shared)
    return f"{text}\n\nall jobs: {common}" if common else text


def label(job: Path, shared: set[str]) -> str:
    """A job by its number and the overrides that set it apart from the others of its sweep."""
    overrides = OmegaConf.to_object(OmegaConf.load(job / ".hydra" / "overrides.yaml"))
    assert isinstance(overrides, list)
    return " ".join([f"{job.name}:", *(each for each in overrides if each.split("=")[0] not in shared)])


def main() -> None:
    if sys.argv[1:2] == ["plan"]:
        from .planned import show

        return show(sys.argv[2:])
    if sys.argv[1:2] == ["balance"]:
        from .planned import PAGE, renew

        return print("written:", PAGE) if renew() else print(PAGE, "is up to date")
    parser = argparse.ArgumentParser(prog="python -m ringattn.launch.report", description=__doc__)
    parser.add_argument("folder", help="the folder of a run or of a sweep; or: benchmarks, plan, balance")
    asked = parser.parse_args().folder
    if asked == BENCHMARKS:
        from .benchmarks.publish import publish  # which takes its tables from here

        print("written:", *publish(), sep="\n  ")
        return
    folder = Path(asked)
    if (folder / RESULTS).is_file():
        print(report_sweep(folder))
    elif (folder / metrics.METRICS).is_file():
        print(report_run(folder))
    else:
        sys.exit(f"{folder} holds neither {RESULTS} (a sweep) nor {metrics.METRICS} (a run): nothing to report")
    if (folder / PLOT).is_file():
        print(f"\nplot: {folder / PLOT}")


if __name__ == "__main__":
    main()
