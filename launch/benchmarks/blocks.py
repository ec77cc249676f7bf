"""Records as tables for readers: a row for each case, a column for each implementation, the best in bold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from ..report import markdown
from .figures import TITLES
from .published import Record, amount, order, spell, told
from .tables import UTILIZATION

__all__ = ["checks", "kernels", "memory", "precision", "scaling", "training", "utilization"]

Spell = Callable[[Record], str]


def pivot(
    records: Iterable[Record], row: Spell, column: Spell, columns: Sequence[str], cell: Spell, corner: str, best=max
) -> str:
    """A table; the best figure of each row, by TFLOP/s or what `best` says, in bold."""
    rows: dict[str, dict[str, Record]] = {}
    for record in records:
        rows.setdefault(row(record), {})[column(record)] = record
    lines = []
    for name, held in rows.items():
        line = {corner: name} | {each: cell(record) for each, record in held.items()}
        if best is not None and len(held) > 1:
            top = best(held, key=lambda each: held[each]["tflops_per_gpu"])
            line[top] = f"**{line[top]}**"
        lines.append(line)
    return markdown(lines, [corner, *columns])


def sections(records: Sequence[Record], passes: Iterable[str], draw: Callable[[list[Record]], str]) -> str:
    """A table for each pass, under its name."""
    parts = []
    for which in passes:
        chosen = [record for record in records if record["pass"] == which]
        if chosen:
            parts.append(f"{TITLES[which]}:\n\n{draw(chosen)}")
    return "\n\n".join(parts)


def signed(records: Sequence[Record], text: str) -> str:
    """With where and when it was measured."""
    return f"{text}\n\n{told(records)}."


def kernels(records: Sequence[Record]) -> str:
    """TFLOP/s of each local kernel; of ours, how many times that is what cuDNN did."""
    rival = {(spell(each), each["pass"]): each["tflops_per_gpu"] for each in records if each["impl"] == "torch-cudnn"}

    def cell(record: Record) -> str:
        theirs = rival.get((spell(record), record["pass"]))
        if theirs is None or not record["impl"].startswith("ringattn-"):
            return rate(record)
        return f"{rate(record)} ({record['tflops_per_gpu'] / theirs:.2f})"

    def draw(chosen: list[Record]) -> str:
        names = order(record["impl"] for record in chosen)
        return pivot(chosen, spell, lambda each: each["impl"], names, cell, "TFLOP/s (times cuDNN's)")

    differing = [each for each in records if each["pass"] == "backward" or not each["impl"].endswith("-deterministic")]
    return signed(records, sections(differing, ("forward", "backward"), draw))


def rate(record: Record) -> str:
    return f"{record['tflops_per_gpu']:.{0 if record['tflops_per_gpu'] >= 100 else 1}f}"


def scaling(records: Sequence[Record]) -> str:
    """TFLOP/s per GPU and efficiency of one ring size and mask; a row for each implementation."""
    held = sorted({record["seq_len"] // record["ranks"] for record in records})
    columns = [f"{amount(tokens)} tokens each" for tokens in held]
    names = order(record["impl"] for record in records)
    ordered = sorted(records, key=lambda record: names.index(record["impl"]))

    def column(record: Record) -> str:
        return f"{amount(record['seq_len'] // record['ranks'])} tokens each"

    def cell(record: Record) -> str:
        efficiency = f" ({record['efficiency']:.0%})" if record["efficiency"] else ""
        exposed = f", {record['exposed_ms']:.2f}" if record["exposed_ms"] is not None else ""
        return f"{rate(record)}{efficiency}, {record['median_ms']:.2f}{exposed}"

    def draw(chosen: list[Record]) -> str:
        return pivot(chosen, over, column, columns, cell, "TFLOP/s (efficiency), ms, exposed ms", best=None)

    def foretell(chosen: list[Record]) -> str:
        return pivot(chosen, over, column, columns, expected, "ms: predicted, measured", best=None)

    def count_cycles(chosen: list[Record]) -> str:
        return pivot(chosen, over, column, columns, cycles, "efficiency in cycles, MHz, one GPU's MHz", best=None)

    both = ("forward", "forward+backward")
    parts = [sections(ordered, both, draw)]
    clocked = [record for record in ordered if record.get("clock_mhz") and record.get("one_gpu_clock_mhz")]
    if clocked:
        parts.append(f"In cycles instead of time:\n\n{sections(clocked, both, count_cycles)}")
    foretold = [record for record in ordered if record.get("predicted_ms") is not None]
    if foretold:
        parts.append(f"What the cost model of `executor=auto` predicted:\n\n{sections(foretold, both, foretell)}")
    return signed(records, "\n\n".join(parts))


def cycles(record: Record) -> str:
    """What the efficiency were if the GPUs' clock did not depend on what they do."""
    here, alone = record["clock_mhz"], record["one_gpu_clock_mhz"]
    return f"{record['efficiency'] * alone / here:.0%}, {here:.0f}, {alone:.0f}"


def expected(record: Record) -> str:
    """A prediction beside its measurement, and what was chosen where that was left open."""
    chose = f" ({record['executor']})" if "-auto-" in record["impl"] else ""
    return f"{record['predicted_ms']:.2f}, {record['median_ms']:.2f}{chose}"


def over(record: Record) -> str:
    """An implementation, with the kernel beneath it where its name does not say."""
    return record["impl"] if record["impl"].startswith("ringattn-") else f"{record['impl']} ({record['kernel']})"


def memory(records: Sequence[Record]) -> str:
    """GiB as the ring grows."""
    rings = sorted({record["ranks"] for record in records})

    def draw(chosen: list[Record]) -> str:
        columns = [count(ranks) for ranks in rings]
        return pivot(chosen, over, lambda each: count(each["ranks"]), columns, weight, "GiB (foretold)", best=None)

    return signed(records, sections(records, ("forward", "forward+backward"), draw))


def weight(record: Record) -> str:
    """The peak, and how much of it was said to be for other ranks' keys and gradients."""
    foretold = record.get("predicted_gib")
    return f"{record['peak_memory_gib']:.3g}" + (f" ({foretold:.3g})" if foretold else "")


def count(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)}"


def precision(records: Sequence[Record]) -> str:
    """Error against fp64 as the ring grows."""
    rings = sorted({record["ranks"] for record in records})
    columns = [count(ranks) for ranks in rings]

    def row(record: Record) -> str:
        return f"{record['part']}, {record['impl']}"

    parts = list(dict.fromkeys(record["part"] for record in records))
    ordered = sorted(records, key=lambda record: parts.index(record["part"]))
    ranks, held = (lambda each: count(each["ranks"])), (lambda each: f"{each['error']:.2e}")
    text = pivot(ordered, row, ranks, columns, held, "error against fp64", best=None)
    return signed(records, f"{spell(records[0])}, {records[0]['dtype']}:\n\n{text}")


def utilization(records: Sequence[Record]) -> str:
    """Counters of the local kernels."""
    parts = []
    for case, group in groupby(records, spell):
        lines = []
        for record in group:
            shares = {
                head: "" if record[field] is None else f"{record[field]:.0%}" for field, head in UTILIZATION.items()
            }
            lines.append({"kernel": record["impl"], "pass": record["pass"], "TFLOP/s": rate(record)} | shares)
        parts.append(f"{case}:\n\n{markdown(lines, list(lines[0]))}")
    return signed(records, "\n\n".join(parts))


def checks(records: Sequence[Record]) -> str:
    """How many comparisons with fp64 passed, and how near the worst came to what is allowed."""
    rows: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        heads = f"{record['q_heads']}:{record['kv_heads']} heads of {record['head_dim']}"
        where = f"{record['ranks']} x {record['gpu']}"
        rows.setdefault((where, record["kernel"], record["dtype"], heads, amount(record["seq_len"])), []).append(record)
    heads = ("ranks", "kernel", "dtype", "heads", "tokens")
    lines = []
    for key, held in rows.items():
        passed = sum(record["result"] == "pass" for record in held)
        worst = max(record["error"] / record["allowed"] for record in held)
        layouts = ", ".join(dict.fromkeys(record["layout"] for record in held))
        line = dict(zip(heads, key, strict=True)) | {"layouts": layouts}
        lines.append(line | {"passed": f"{passed} of {len(held)}", "worst": f"{worst:.0%} of what is allowed"})
    return signed(records, markdown(lines, list(lines[0])))


def training(records: Sequence[Record]) -> str:
    """What training runs ended with."""
    columns = ("ranks", "context", "layout", "kernel", "dtype", "batch", "seq_len", "steps", "loss")
    lines = []
    for record in records:
        line = {column: str(record[column]) for column in columns} | {"loss": f"{record['loss']:.4f}"}
        line |= {"tokens/s": f"{record['tokens_per_second']:,.0f}", "GiB": f"{record['peak_memory_gib']:.2f}"}
        lines.append(line)
    return signed(records, markdown(lines, list(lines[0])))
