"""Pictures: loss curves of runs, two runs compared, and a plan as the mask it computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ringattn import Plan

__all__ = ["draw_comparison", "draw_losses", "draw_plan"]

# Okabe and Ito's colours, told apart by colour-blind eyes too; more ranks than that get a gradient.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#5B4B8A")
INK, PALE = "#333333", "#E3E3E3"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.xmargin": 0.02,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
}

Records = Mapping[int, Mapping[str, Any]]  # as `metrics.read` gives them


def colors(count: int) -> list[tuple[float, float, float]]:
    """A colour for each of `count` things."""
    if count <= len(COLORS):
        return [to_rgb(color) for color in COLORS[:count]]
    return [to_rgb(mpl.colormaps["turbo"](x)) for x in np.linspace(0.05, 0.95, count)]


def series(records: Records, name: str) -> tuple[list[int], list[float]]:
    """Steps at which `name` was measured, and what was measured."""
    steps = [step for step, record in records.items() if name in record]
    return steps, [records[step][name] for step in steps]


def draw_losses(runs: Mapping[str, Records], path: Path) -> None:
    """Loss by step, a curve per run; validation losses as marks in the run's colour."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for number, ((label, records), color) in enumerate(zip(runs.items(), colors(len(runs)), strict=True)):
            width = 1.2 + 3.6 * (1 - (number + 1) / len(runs))  # the later the thinner: equal curves stay visible
            axes.plot(*series(records, "loss"), color=color, linewidth=width, label=label)
            steps, losses = series(records, "validation_loss")
            if steps:
                axes.plot(steps, losses, "o", color=color, markersize=5, markeredgecolor="white")
        validated = any("validation_loss" in record for records in runs.values() for record in records.values())
        axes.set(xlabel="step", ylabel="nats per byte", title="Loss" + (" (dots: held-out text)" * validated))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(runs) > 1:
            axes.legend(fontsize=9, ncols=1 + (len(runs) > 8))
        figure.savefig(path)


def draw_comparison(runs: Mapping[str, Records], path: Path, allowed: float | None) -> None:
    """Two runs that should be the same: their losses, and below them how far apart they are."""
    (first, a), (second, b) = runs.items()
    steps, losses = series(a, "loss")
    apart = [abs(loss - b[step]["loss"]) for step, loss in zip(steps, losses, strict=True)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        above.plot(steps, losses, color=COLORS[0], linewidth=4, alpha=0.4, label=first)
        above.plot(*series(b, "loss"), color=COLORS[5], linewidth=1.2, label=second)
        above.set(ylabel="nats per byte", title="Loss")
        above.legend()
        floor = 1e-8  # where equal losses are drawn: zero has no place on a logarithmic axis
        below.semilogy(steps, np.maximum(apart, floor), ".", color=COLORS[0], markersize=5)
        if allowed is not None:
            below.axhline(allowed, color=COLORS[5], linewidth=1.2)
            note(below, f"allowed: below {allowed:.0e}", (steps[-1], allowed), (0, 4), ha="right", color=COLORS[5])
            below.set_ylim(floor / 2, allowed * 5)
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.set(xlabel="step", title=f"Difference, largest {max(apart):.1e}; the lowest row is no difference at all")
        figure.savefig(path)


def draw_plan(plan: Plan, path: Path, *, traffic: bool = False) -> None:
    """The mask in global positions, coloured by the rank that computes it, and a bar of each rank's work.

    Full colour: keys that the rank holds itself. Lighter: keys that reach it from another rank. With `traffic` also
    how many keys each rank needs from each other one.
    """
    palette = np.array(colors(plan.ranks))
    image, own, other = shade(plan, palette)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14.5 if traffic else 10, 5.6), layout="constrained")
        left, right, *more = figure.subplots(1, 2 + traffic, width_ratios=(1.25, 1, 1)[: 2 + traffic])
        length = max(plan.layout.seq_len, 1)
        left.grid(False)
        left.imshow(image, extent=(0, length, length, 0), interpolation="nearest")
        left.set(xlabel="key position", ylabel="query position")
        figure.suptitle(
            f"{length:,} tokens on {plan.ranks} ranks, layout {plan.layout.name}, mask: {plan.mask}",
            x=0.01, ha="left", fontsize=11, fontweight="bold",
        )  # fmt: skip
        left.set_title("Who computes what")
        draw_work(right, plan, palette, own, other)
        for axes in more:
            draw_traffic(axes, plan)
        figure.savefig(path)


def shade(plan: Plan, palette: np.ndarray, size: int = 768) -> tuple[np.ndarray, list[int], list[int]]:
    """The mask as an RGB image of at most `size` pixels a side, and each rank's pairs with own and others' keys.

    A long sequence is sampled: pixel (i, j) stands for one query and one key of its square.
    """
    length = plan.layout.seq_len
    tokens = np.arange(min(length, size)) * length // max(min(length, size), 1)
    image = np.ones((len(tokens), len(tokens), 3))
    own, other = [0] * plan.ranks, [0] * plan.ranks
    where = [locate(plan, rank, tokens) for rank in range(plan.ranks)]
    for rank, (rows, row_pixels) in enumerate(where):
        for source, (columns, column_pixels) in enumerate(where):
            segments = plan.segments(rank, source)
            (own if source == rank else other)[rank] += segments.pairs
            color = palette[rank] if source == rank else 1 - 0.45 * (1 - palette[rank])
            for segment in segments:
                row, column = rows[:, None] - segment.q_start, columns[None, :] - segment.k_start
                inside = (row >= 0) & (row < segment.q_len) & (column >= 0) & (column < segment.k_len)
                back = row + segment.offset - column
                seen_rows, seen_columns = np.nonzero(inside & (back >= 0) & (back < segment.window))
                image[row_pixels[seen_rows], column_pixels[seen_columns]] = color
    return image, own, other


def locate(plan: Plan, rank: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of some global positions, those that a rank holds: where in its shard, and which of the given they are."""
    positions = plan.layout.positions(rank).numpy()
    _, local, given = np.intersect1d(positions, tokens, assume_unique=True, return_indices=True)
    return local, given


def draw_work(axes: Axes, plan: Plan, palette: np.ndarray, own: list[int], other: list[int]) -> None:
    """A bar per rank, as a share of all visible pairs."""
    total = max(sum(own) + sum(other), 1)
    ranks = range(plan.ranks)
    mine, theirs = 100 * np.array(own) / total, 100 * np.array(other) / total
    axes.barh(ranks, mine, color=palette, height=0.7)
    axes.barh(ranks, theirs, left=mine, color=1 - 0.45 * (1 - palette), height=0.7)
    if plan.ranks <= 16:
        axes.set_yticks(ranks)
        for rank, share in enumerate(mine + theirs):
            note(axes, f"{share:.1f}%", (max(mine + theirs), rank), (6, 0), va="center")
    axes.axvline(100 / plan.ranks, color=INK, linewidth=1, linestyle=":")
    axes.grid(False)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="share of all visible pairs, %", ylabel="rank")
    axes.set_title(f"Work by rank: balance {plan.balance:.1%}")
    shades = {"with its own keys": "#777777", "with keys from other ranks": "#C2C2C2"}
    patches = [Patch(color=color, label=label) for label, color in shades.items()]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=9)


def draw_traffic(axes: Axes, plan: Plan) -> None:
    """Keys that each rank (a row) needs of each other rank (a column), as a share of a shard."""
    needed = plan.keys_needed.astype(float)
    np.fill_diagonal(needed, np.nan)
    shard = max(*plan.layout.lengths, 1)
    axes.grid(False)
    axes.imshow(needed / shard, cmap="Blues", vmin=0, vmax=1)
    if plan.ranks <= 16:
        axes.set_xticks(range(plan.ranks))
        axes.set_yticks(range(plan.ranks))
        for rank, source in zip(*np.nonzero(np.nan_to_num(needed)), strict=True):
            share = needed[rank, source] / shard
            color = "white" if share > 0.6 else INK
            note(axes, f"{share:.0%}", (source, rank), (0, 0), ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="from rank", ylabel="to rank")
    axes.set_title("Keys needed from other ranks, of a shard")


def note(axes: Axes, text: str, at: tuple[float, float], points: tuple[float, float], **how: Any) -> None:
    """Text some points away from a place on the axes."""
    axes.annotate(text, at, points, textcoords="offset points", **how)
