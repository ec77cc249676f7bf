"""From records to pages: tables and pictures in the marked blocks of README.md and docs/benchmarks.md.

    <!-- benchmark: kernel -->
    ... replaced by what docs/benchmarks/kernel.jsonl says ...
    <!-- end -->

A picture's block names the records that it was drawn from, so the text alone shows whether a page is up to date.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ..records import ROOT
from . import blocks, figures, pictures
from .forecast import forecast
from .published import Record, digest, read

__all__ = ["PAGES", "publish", "stale"]

PAGES = ("README.md", "docs/benchmarks.md")
BLOCK = re.compile(r"(?<=<!-- benchmark: )([\w-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


class Picture(NamedTuple):
    """A file in docs/images, and how it is drawn."""

    name: str
    says: str  # for those who do not see it
    records: Sequence[Record]
    draw: Callable[[Sequence[Record], Path], None]


class Library:
    """The records of a checkout, and what its blocks say."""

    def __init__(self, root: Path):
        self.root = root
        self.images = root / "docs" / "images"
        self.drawn: dict[str, Picture] = {}

    def read(self, bench: str) -> list[Record]:
        return read(self.root / "docs" / "benchmarks", bench)

    def fill(self, page: str) -> str:
        """A page's text with its blocks renewed; pictures that it shows are then in `drawn`."""
        path = self.root / page
        return BLOCK.sub(lambda found: found[1] + found[2] + self.block(found[1], path.parent) + "\n", path.read_text())

    def block(self, name: str, folder: Path) -> str:
        """What a block says on a page in `folder`."""
        if name == "forecast":
            return forecast()
        bench = name.removesuffix("-picture")
        records = self.read(bench)
        if not records:
            command = f"python -m ringattn.launch.{bench if bench in OTHERS else f'bench bench={bench}'}"
            return f"No record yet: `{command} record=docs/benchmarks/{bench}.jsonl`."
        return BLOCKS[name](self, records, folder)

    def show(self, picture: Picture, folder: Path) -> str:
        """The lines that show a picture."""
        self.drawn[picture.name] = picture
        where = os.path.relpath(self.images / f"{picture.name}.png", folder)
        return f"![{picture.says}]({where})\n<!-- drawn from {digest(picture.records)} -->"


OTHERS = ("check", "train")  # commands of their own


def kernel_picture(library: Library, records: list[Record], folder: Path) -> str:
    says = "TFLOP/s of local attention kernels, ours and the peers', by case"
    return library.show(Picture("kernels", says, records, figures.draw_kernels), folder)


def scaling_groups(records: list[Record]) -> list[tuple[str, list[Record]]]:
    """What is compared with each other: a name, and its records; the largest ring last."""

    def name(record: Record) -> str:
        heads = f"{record['q_heads']}:{record['kv_heads']} heads of {record['head_dim']}"
        mask = "no" if record["mask"] == "none" else record["mask"]
        return f"{record['ranks']} x {record['gpu']}, {mask} mask, batch {record['batch']}, {heads}, {record['dtype']}"

    ordered = sorted(records, key=lambda record: (record["ranks"], name(record)))
    return [(title, list(group)) for title, group in groupby(ordered, name)]


def scaling_drawing(title: str, records: list[Record]) -> Picture:
    file = "scaling-{ranks}-{mask}-{batch}-{q_heads}-{kv_heads}-{head_dim}-{dtype}".format(**records[0])
    says = f"TFLOP/s per GPU and efficiency by tokens on each GPU: {title}"
    return Picture(file, says, records, figures.draw_scaling)


def scaling_picture(library: Library, records: list[Record], folder: Path) -> str:
    """The largest ring's causal one."""
    groups = scaling_groups(records)
    causal = [group for group in groups if group[1][0]["mask"] == "causal"] or groups
    return library.show(scaling_drawing(*causal[-1]), folder)


def scaling(library: Library, records: list[Record], folder: Path) -> str:
    parts = []
    for title, group in scaling_groups(records):
        parts += [f"### {title}", library.show(scaling_drawing(title, group), folder), blocks.scaling(group)]
    return "\n\n".join(parts)


def memory(library: Library, records: list[Record], folder: Path) -> str:
    picture = Picture("memory", "peak memory as the ring grows", records, pictures.draw_memory)
    return f"{library.show(picture, folder)}\n\n{blocks.memory(records)}"


def precision(library: Library, records: list[Record], folder: Path) -> str:
    picture = Picture("precision", "error against fp64 as the ring grows", records, pictures.draw_precision)
    return f"{library.show(picture, folder)}\n\n{blocks.precision(records)}"


def utilization(library: Library, records: list[Record], folder: Path) -> str:
    parts = []
    alone = [record for record in records if "timeline" not in record]
    counted = [record for record in alone if record["dram_gib"]]
    seen = [record for record in records if "timeline" in record]
    if counted:
        first = [record for record in counted if record["seq_len"] == counted[0]["seq_len"]]
        parts.append(
            library.show(Picture("roofline", "roofline of local kernels", first, pictures.draw_roofline), folder)
        )
    if alone:
        parts.append(blocks.utilization(alone))
    if seen:
        says = "when each rank computed and communicated in one step"
        parts.append(library.show(Picture("timeline", says, seen, pictures.draw_timeline), folder))
    return "\n\n".join(parts)


def table(draw: Callable[[Sequence[Record]], str], library: Library, records: list[Record], folder: Path) -> str:
    return draw(records)


BLOCKS: dict[str, Callable[[Library, list[Record], Path], str]] = {
    "kernel": partial(table, blocks.kernels),
    "kernel-picture": kernel_picture,
    "scaling": scaling,
    "scaling-picture": scaling_picture,
    "memory": memory,
    "precision": precision,
    "utilization": utilization,
    "check": partial(table, blocks.checks),
    "train": partial(table, blocks.training),
}


def stale(root: Path = ROOT) -> list[str]:
    """The pages that say something else than the records do, and the pictures that are missing."""
    library = Library(root)
    pages = [page for page in PAGES if library.fill(page) != (root / page).read_text()]
    missing = [f"docs/images/{name}.png" for name in library.drawn if not (library.images / f"{name}.png").is_file()]
    return pages + missing


def publish(root: Path = ROOT) -> list[str]:
    """Renews the pages and draws their pictures; returns what was written."""
    library = Library(root)
    written = []
    for page in PAGES:
        text = library.fill(page)
        if text != (root / page).read_text():
            (root / page).write_text(text)
            written.append(page)
    for name, picture in library.drawn.items():
        picture.draw(picture.records, library.images / f"{name}.png")
        written.append(f"docs/images/{name}.png")
    return written
