"""Hardware counters of calls, from Nsight Compute where it is installed.

A call may launch several kernels. Bytes and times add up; a share of a peak is the mean over the kernels, weighted by
their time.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from . import once

__all__ = ["FIELDS", "Call", "Counters", "Missing", "count"]

TIME = "gpu__time_duration.sum"  # in nanoseconds
BYTES = ("dram__bytes_read.sum", "dram__bytes_write.sum")
SHARES = {  # field of a record: counter, its value for 100 %
    "sm_utilization": ("sm__throughput.avg.pct_of_peak_sustained_elapsed", 100.0),
    "memory_utilization": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 100.0),
    "l2_hit_rate": ("lts__t_sector_hit_rate.pct", 100.0),
    "warp_efficiency": ("smsp__thread_inst_executed_per_inst_executed.ratio", 32.0),
    "tensor_utilization": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", 100.0),
}
FIELDS = (*SHARES, "dram_gib", "profiled_ms", "kernels")
Call = tuple[str, str]  # implementation, pass
Counters = dict[str, float]
Row = dict[str, str]
METRICS = (TIME, *BYTES, *(counter for counter, _ in SHARES.values()))


class Missing(RuntimeError):
    """There are no counters; says why."""


def count(names: Sequence[str], case_text: str, dtype: str, seed: int, patience: float) -> dict[Call, Counters]:
    """The counters of a forward and a backward of each implementation, by the names in `FIELDS`; calls that ncu did
    not come to are left out.

    Raises:
        Missing: Nsight Compute is not there, or saw nothing.
    """
    if shutil.which("ncu") is None:
        raise Missing("Nsight Compute (ncu) is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "counters.csv"
        profiler = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--log-file", str(log)]
        page = ["--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS)]
        program = [sys.executable, "-m", once.__name__, f"{patience / 2:g}", case_text, dtype, str(seed), *names]
        said = run([*profiler, *page, *program], patience)
        lines = log.read_text().splitlines() if log.exists() else []
    kernels = [row for row in csv.DictReader(line for line in lines if line.startswith('"')) if row["ID"]]
    if not kernels:
        last = (said.strip() or "\n".join(lines) or "no output").splitlines()[-1]
        raise Missing(f"Nsight Compute saw no kernel: {last}")
    calls = product(names, ("forward", "backward"))
    return {call: summary(launched) for call, launched in zip(calls, by_call(kernels), strict=False) if launched}


def run(command: list[str], patience: float) -> str:
    """What a command says on its standard error; ended with all that it started if it takes too long."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=pipe, text=True, start_new_session=True)
    try:
        return process.communicate(timeout=patience)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Missing(f"Nsight Compute did not end within {patience:g} s") from None


def by_call(kernels: Iterable[Row]) -> list[list[Row]]:
    """The kernels of each call: what follows a marker."""
    calls: list[list[Row]] = []
    for row in kernels:
        if once.MARKER in row["Kernel Name"]:
            calls.append([])
        elif calls:
            calls[-1].append(row)
    return calls


def summary(kernels: Iterable[Row]) -> Counters:
    """Of a row of counters per kernel, those of all kernels together; a counter that no kernel has is left out."""
    rows = [{name: number(row.get(name)) for name in METRICS} for row in kernels]
    times = [row[TIME] or 0.0 for row in rows]
    found: Counters = {"kernels": len(rows), "profiled_ms": sum(times) / 1e6}
    moved = [row[name] for row in rows for name in BYTES]
    if None not in moved:
        found["dram_gib"] = sum(each or 0.0 for each in moved) / 2**30
    for field, (counter, full) in SHARES.items():
        weighted = [(row[counter], time) for row, time in zip(rows, times, strict=True)]
        known = [(value, time) for value, time in weighted if value is not None]
        if known and sum(time for _, time in known):
            found[field] = sum(value * time for value, time in known) / sum(time for _, time in known) / full
    return found


def number(text: str | None) -> float | None:
    """A counter's value; None for what is not a number, such as "n/a".

    Example:
        >>> number("1,234.5"), number("n/a"), number(None)
        (1234.5, None, None)
    """
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None
