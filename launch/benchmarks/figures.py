"""Pictures of speed: local kernels case by case, and rings against the tokens on each GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plots import COLORS, INK, STYLE
from .published import Record, amount, order

__all__ = ["color_of", "draw_kernels", "draw_scaling", "leaders"]

Spell = Callable[[Record], str]
TITLES = {"forward": "Forward", "backward": "Backward", "forward+backward": "Forward and backward"}
OURS = ("#0072B2", "#56B4E9", "#004C7A", "#8CC8F0")  # blues
MOST_UPRIGHT = 34  # bars side by side whose words are not too wide
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}  # behind words that lines would cross
THEIRS = {  # a colour keeps its owner in every picture
    "torch-math": "#BBBBBB",
    "torch-fa2": "#E69F00",
    "torch-cudnn": "#D55E00",
    "fa4": "#009E73",
    "allgather": "#BBBBBB",
    "ulysses": "#E69F00",
    "torch-cp-allgather": "#D55E00",
    "torch-cp-alltoall": "#CC79A7",
    "torch-cp-flex": "#8B5A2B",
    "ring-flash-attn-zigzag": "#009E73",
    "ring-flash-attn-stripe": "#7FC6AE",
    "ring-flash-attn-ring": "#B8A800",
    "ring-flash-attn-llama3": "#009E73",
}


def color_of(name: str, names: Sequence[str]) -> str:
    """A blue for ours, and for each peer always the same other one."""
    if name.startswith("ringattn-"):
        ours = [each for each in names if each.startswith("ringattn-")]
        return OURS[ours.index(name) % len(OURS)]
    return THEIRS.get(name, COLORS[7])


def brief(record: Record) -> str:
    """A case under a group of bars."""
    mask = "no mask" if record["mask"] == "none" else record["mask"]
    batch = f"{record['batch']} x " if record["batch"] > 1 else ""
    return (
        f"{batch}{amount(record['seq_len'])}\n{mask}\n{record['q_heads']}:{record['kv_heads']} of {record['head_dim']}"
    )


def bars(
    axes: Axes, records: Sequence[Record], names: Sequence[str], groups: Sequence[str], group: Spell, above: Spell
) -> None:
    """A group of bars, TFLOP/s, a bar for each implementation, with a word above it."""
    width = 0.84 / len(names)
    for place, name in enumerate(names):
        held = [record for record in records if record["impl"] == name]
        at = [groups.index(group(record)) + (place - (len(names) - 1) / 2) * width for record in held]
        axes.bar(
            at, [record["tflops_per_gpu"] for record in held], width * 0.92, color=color_of(name, names), label=name
        )
        for x, record in zip(at, held, strict=True):
            axes.annotate(
                above(record), (x, record["tflops_per_gpu"]), (0, 2), textcoords="offset points", ha="center",
                va="bottom", fontsize=8, rotation=90 if len(names) * len(groups) > MOST_UPRIGHT else 0, bbox=PAPER,
            )  # fmt: skip
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.16)
    axes.set_xticks(range(len(groups)), groups, fontsize=9)


def panels(passes: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A row for each pass."""
    figure = Figure(figsize=(10, 1.2 + 2.5 * len(passes)), layout="constrained")
    rows = list(figure.subplots(len(passes), 1, sharex=True, squeeze=False)[:, 0])
    for axes, which in zip(rows, passes, strict=True):
        axes.set(title=TITLES[which])
    return figure, rows


def legend(figure: Figure, title: str | None = None) -> None:
    """Everybody once, above all panels."""
    found = [axes.get_legend_handles_labels() for axes in figure.axes]
    named = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    names = order(named)
    columns = min(len(names), 7 if max(map(len, names)) < 16 else 4)
    handles = [named[name] for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=columns, fontsize=9, title=title)


def draw_kernels(records: Sequence[Record], path: Path) -> None:
    """TFLOP/s of each implementation by case, the forward above the backward; plain attention, which is hardly to be
    seen, and the deterministic ways are in the table only."""
    records = [each for each in records if each["impl"] != "torch-math" and not each["impl"].endswith("-deterministic")]
    names = order(record["impl"] for record in records)
    cases = list(dict.fromkeys(brief(record) for record in records))
    passes = [which for which in ("forward", "backward") if any(record["pass"] == which for record in records)]
    with mpl.rc_context(STYLE):
        figure, rows = panels(passes)
        for axes, which in zip(rows, passes, strict=True):
            chosen = [record for record in records if record["pass"] == which]
            bars(axes, chosen, names, cases, brief, lambda record: f"{record['tflops_per_gpu']:.0f}")
            axes.set(ylabel="TFLOP/s")
        legend(figure)
        figure.savefig(path)


def leaders(records: Sequence[Record]) -> list[str]:
    """Who is drawn: of ours the fastest with each executor, of ring-flash-attn the fastest variant, all others."""

    def family(name: str) -> str:
        if name.startswith("ringattn-"):
            return "ringattn " + name.split("-")[2]
        return "ring-flash-attn" if name.startswith("ring-flash-attn") else name

    best: dict[str, tuple[float, str]] = {}
    for name in order(record["impl"] for record in records):
        ratios = [record["efficiency"] or 0.0 for record in records if record["impl"] == name]
        key, mean = family(name), sum(ratios) / len(ratios)
        best[key] = max(best.get(key, (-1.0, "")), (mean, name))
    return order(name for _, name in best.values())


def draw_scaling(records: Sequence[Record], path: Path) -> None:
    """TFLOP/s per GPU by the tokens on each GPU; above each bar its efficiency. A line: what one GPU does alone."""
    names = leaders(records)
    held = sorted({record["seq_len"] // record["ranks"] for record in records})
    passes = [which for which in TITLES if any(record["pass"] == which for record in records)]
    ranks = records[0]["ranks"]
    with mpl.rc_context(STYLE):
        figure, rows = panels(passes)
        for axes, which in zip(rows, passes, strict=True):
            chosen = [record for record in records if record["pass"] == which and record["impl"] in names]
            bars(axes, chosen, names, [amount(tokens) for tokens in held], tokens_of, efficiency_of)
            for record in chosen:
                if record["efficiency"]:
                    at, full = held.index(record["seq_len"] // ranks), record["tflops_per_gpu"] / record["efficiency"]
                    axes.hlines(full, at - 0.45, at + 0.45, color=INK, linewidth=1, linestyle=":")
            axes.set(ylabel="TFLOP/s per GPU")
        rows[-1].set(xlabel="tokens on each GPU")
        legend(figure, f"{ranks} ranks; above each bar its strong-scaling efficiency, dotted: one GPU alone")
        figure.savefig(path)


def tokens_of(record: Record) -> str:
    return amount(record["seq_len"] // record["ranks"])


def efficiency_of(record: Record) -> str:
    return "" if record["efficiency"] is None else f"{record['efficiency']:.0%}"
