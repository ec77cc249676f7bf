"""What the cost model says of rings larger than those that were measured, as a table."""

from __future__ import annotations

from ringattn.cost import choose_executor

from ..predict import dense, efficiencies
from ..report import markdown
from .published import amount

__all__ = ["forecast"]

RANKS = (4, 8, 16, 32, 64)
NODE = 8  # GPUs that NVLink joins; nodes are joined by the network
TOKENS = (2048, 8192, 32768)  # on each


def forecast() -> str:
    """A row per ring, a column per length: the executor, milliseconds and efficiency, forward and both passes."""
    corner = "forward, both: ms (efficiency)"
    rows = []
    for ranks in RANKS:
        nodes = f"{-(-ranks // NODE)} node{'s' * (ranks > NODE)}"
        rows.append(
            {corner: f"{ranks} GPUs, {nodes}"}
            | {f"{amount(tokens)} tokens each": cell(tokens, ranks) for tokens in TOKENS}
        )
    return markdown(rows, list(rows[0]))


def cell(tokens: int, ranks: int) -> str:
    load = dense(tokens, ranks, same_node=ranks <= NODE)
    choice = choose_executor("auto", load)
    chosen = next(each for each in choice.predictions if each[:2] == (choice.executor, choice.schedule))
    onward, both = efficiencies(load, chosen.forward, chosen.backward)
    figures = f"{1e3 * chosen.forward:.4g} ({onward:.0%}), {1e3 * chosen.total:.4g} ({both:.0%})"
    return f"{choice.executor}: {figures}"
