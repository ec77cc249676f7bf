"""Plans on paper: what a layout and a mask mean for each rank, and layouts compared, without a GPU.

    python -m ringattn.launch.report plan --tokens 65536 --ranks 8 --layout balanced --documents log-normal
    python -m ringattn.launch.report plan --tokens 1000 --cu-seqlens 0,100,400,900 --window 200 --picture plan.png
    python -m ringattn.launch.report balance

The page docs/balance.md is made by the last of these; a test holds it to what the planner does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from ringattn import Plan, make_plan
from ringattn.layout import LAYOUTS

from .packing import LENGTHS, packed
from .plots import draw_plan
from .records import ROOT
from .report import markdown

__all__ = ["PAGE", "comparison", "renew", "show", "traffic"]

PAGE = "docs/balance.md"
BEGIN, END = "<!-- balance -->\n", "<!-- end -->"
RANKS = (4, 8, 64)
TOKENS = 8192  # on each rank
COMPARED = ("balanced", "zigzag", "contiguous")


def show(words: Sequence[str]) -> None:
    """Prints a plan, and draws it where a picture is asked for."""
    parser = argparse.ArgumentParser(prog="python -m ringattn.launch.report plan", description="A plan on paper.")
    parser.add_argument("--tokens", type=int, default=32768, help="of the whole sequence")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layout", default="balanced", choices=list(LAYOUTS))
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--window", type=int, help="the last so many keys, a query's own among them")
    parser.add_argument("--documents", choices=list(LENGTHS), help="packed, of such lengths")
    parser.add_argument("--cu-seqlens", help="packed, with bounds of your own: 0,100,400,900")
    parser.add_argument("--picture", type=Path, default=Path("plan.png"))
    asked = parser.parse_args(words)
    cu_seqlens = packed(asked.documents, asked.tokens) if asked.documents else None
    if asked.cu_seqlens:
        cu_seqlens = [int(number) for number in asked.cu_seqlens.split(",")]
    mask = {"causal": asked.causal, "window_size": asked.window, "cu_seqlens": cu_seqlens}
    begin = time.perf_counter()
    plan = make_plan(asked.layout, asked.tokens, asked.ranks, **mask)
    plan.reach(0)
    took = 1000 * (time.perf_counter() - begin)
    print(f"{plan}\n\nplanned in {took:.1f} ms\n\n{traffic(plan)}")
    asked.picture.parent.mkdir(parents=True, exist_ok=True)
    draw_plan(plan, asked.picture, traffic=True)
    print(f"\npicture: {asked.picture}")


def traffic(plan: Plan) -> str:
    """Keys that each rank needs of each other rank."""
    needed = plan.keys_needed.tolist()
    ranks = range(min(plan.ranks, 16))
    rows = [
        {"to rank": rank, **{f"from {source}": "own" if source == rank else needed[rank][source] for source in ranks}}
        for rank in ranks
    ]
    missing = f"\n(of {plan.ranks} ranks)" if plan.ranks > len(ranks) else ""
    return "Keys needed from other ranks, in tokens:\n\n" + markdown(rows, list(rows[0])) + missing


def comparison() -> str:
    """Each layout's imbalance and traffic for documents of each kind of length, as a markdown table."""
    rows = []
    for name in LENGTHS:
        for ranks in RANKS:
            cu_seqlens = packed(name, TOKENS * ranks)
            plans = [
                make_plan(layout, TOKENS * ranks, ranks, causal=True, cu_seqlens=cu_seqlens) for layout in COMPARED
            ]
            rows.append(
                {"lengths": name, "ranks": ranks, "documents": len(cu_seqlens) - 1}
                | {plan.layout.name: f"{1 / plan.balance - 1:.1%}" for plan in plans}
                | {f"keys, {plan.layout.name}": f"{elsewhere(plan):.2f}" for plan in plans}
            )
    return markdown(rows, list(rows[0]))


def elsewhere(plan: Plan) -> float:
    """Keys that a rank needs of others, in shards, on average."""
    return (plan.keys_needed.sum() - plan.keys_needed.trace()) / plan.layout.seq_len


def renew(root: Path = ROOT, *, write: bool = True) -> bool:
    """Puts the table into the page; returns whether the page said something else."""
    page = root / PAGE
    text = page.read_text()
    head, rest = text.split(BEGIN)
    fresh = head + BEGIN + comparison() + "\n" + END + rest.split(END, 1)[1]
    if write and fresh != text:
        page.write_text(fresh)
    return fresh != text
