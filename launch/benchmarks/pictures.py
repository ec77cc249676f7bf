"""Pictures of what speed costs and where it goes: memory, error, the roofline, and when ranks compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..plots import INK, STYLE
from .cases import tera_operations
from .figures import TITLES, color_of, leaders, legend
from .published import Record, amount, case_of, order, spell

__all__ = ["draw_memory", "draw_precision", "draw_roofline", "draw_timeline"]

MARKERS = {"forward": "o", "backward": "s"}
STRETCHES = {"compute": "#0072B2", "communication": "#E69F00"}


def draw_memory(records: Sequence[Record], path: Path) -> None:
    """GiB against the number of ranks, a panel for each pass."""
    names = leaders(records)
    passes = [which for which in TITLES if any(record["pass"] == which for record in records)]
    rings = sorted({record["ranks"] for record in records})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, which in zip(figure.subplots(1, len(passes), squeeze=False)[0], passes, strict=True):
            for name in reversed(names):
                held = [each for each in records if each["impl"] == name and each["pass"] == which]
                curve(axes, name, names, rings, {each["ranks"]: each["peak_memory_gib"] for each in held})
            tokens = amount(records[0]["seq_len"] // records[0]["ranks"])
            axes.set(title=TITLES[which], xlabel=f"ranks, {tokens} tokens on each", ylabel="peak memory, GiB")
            axes.set_ylim(bottom=0)
        legend(figure)
        figure.savefig(path)


def draw_precision(records: Sequence[Record], path: Path) -> None:
    """Error against fp64 by the number of ranks, a panel for each part of the result."""
    names = order(record["impl"] for record in records)
    parts = list(dict.fromkeys(record["part"] for record in records))
    rings = sorted({record["ranks"] for record in records})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
            for name in reversed(names):
                held = [each for each in records if each["impl"] == name and each["part"] == part]
                curve(axes, name, names, rings, {each["ranks"]: 1e3 * each["error"] for each in held})
            axes.set(title=part, xlabel="ranks")
            axes.set_ylim(bottom=0)
            axes.margins(y=0.2)
        figure.axes[0].set(ylabel="error against fp64, 1e-3")
        legend(figure)
        figure.savefig(path)


def curve(axes: Axes, name: str, names: Sequence[str], rings: Sequence[int], values: dict[int, float]) -> None:
    """One implementation against the number of ranks; ours thicker."""
    ours = name.startswith("ringattn-")
    axes.plot(
        [rings.index(ranks) for ranks in values], list(values.values()), "o-", label=name,
        color=color_of(name, names), linewidth=2.6 if ours else 1.5, markersize=6 if ours else 4,
    )  # fmt: skip
    axes.set_xticks(range(len(rings)), [str(ranks) for ranks in rings])


def draw_roofline(records: Sequence[Record], path: Path) -> None:
    """TFLOP/s against operations per byte of device memory, under the two ceilings of this GPU."""
    names = order(record["impl"] for record in records)
    compute, memory = records[0]["peak_tflops"], records[0]["peak_gbs"] / 1e3
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes = figure.subplots()
        found = []
        for record in records:
            per_byte = 1e12 * tera_operations(case_of(record), record["pass"]) / (record["dram_gib"] * 2**30)
            found.append(per_byte)
            axes.plot(
                per_byte, record["tflops_per_gpu"], MARKERS[record["pass"]], color=color_of(record["impl"], names),
                markersize=9, markeredgecolor="white", label=f"{record['impl']}, {record['pass']}",
            )  # fmt: skip
        reach = np.geomspace(min(*found, compute / memory) / 4, max(*found, compute / memory) * 4, 400)
        axes.plot(reach, np.minimum(reach * memory, compute), color=INK, linewidth=1.5)
        axes.annotate(f"matrix product: {compute:.0f} TFLOP/s", (reach[-1], compute), (0, 4), ha="right", **POINTS)
        corner = compute / memory
        axes.annotate(f"copy: {1e3 * memory:.0f} GB/s", (corner / 2, compute / 2), (-6, 0), ha="right", **POINTS)
        axes.set(xscale="log", yscale="log", xlabel="operations per byte of device memory", ylabel="TFLOP/s")
        axes.set_title(spell(records[0]))
        figure.legend(loc="outside right upper", fontsize=9)
        figure.savefig(path)


POINTS = {"textcoords": "offset points", "fontsize": 9}


def draw_timeline(records: Sequence[Record], path: Path) -> None:
    """For each implementation, when each rank computed and when data travelled; a row of two lanes for each rank."""
    with mpl.rc_context(STYLE):
        ranks = max(record["ranks"] for record in records)
        figure = Figure(figsize=(10, 0.6 + len(records) * (0.8 + 0.28 * ranks)), layout="constrained")
        rows = figure.subplots(len(records), 1, sharex=True, squeeze=False)[:, 0]
        for axes, record in zip(rows, records, strict=True):
            for what, lane in (("compute", 0.0), ("communication", 0.4)):
                for rank in range(record["ranks"]):
                    seen = [
                        (a / 1e3, (b - a) / 1e3)
                        for each, kind, a, b in record["timeline"]
                        if (each, kind) == (rank, what)
                    ]
                    axes.broken_barh(seen, (rank + lane - 0.4, 0.38), color=STRETCHES[what], linewidth=0)
            axes.set_yticks(range(record["ranks"]), [f"rank {rank}" for rank in range(record["ranks"])])
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.set_title(f"{record['impl']}, {record['pass']}: {spell(record)}")
        rows[-1].set(xlabel="ms")
        patches = [Patch(color=color, label=what) for what, color in STRETCHES.items()]
        figure.legend(handles=patches, loc="outside upper right", ncols=2, fontsize=9)
        figure.savefig(path)
