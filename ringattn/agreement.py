"""What ranks must have in common before they compute together, compared when a configuration is first used.

Each rank writes a record of its configuration, or the reason why it refuses its inputs, into the store that the
ranks met through, and reads the others'. So every rank raises, and says which rank differs in what, where a
collective of unequal calls would hang or give wrong numbers.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ringattn.ranks import Ranks

__all__ = ["RankDisagreement", "agree"]

OF_EACH_RANK = ("tokens", "node", "memory")  # fields that may differ

Field = str | int | float | bool
Record = dict[str, Field]


class RankDisagreement(RuntimeError):
    """Ranks called with different configurations; nothing was computed."""


def exchange_records(ranks: Ranks, record: Record) -> list[Record]:
    """Every rank's record of this call, in rank order."""
    assert ranks.group is not None
    store = PrefixStore(f"ringattn/{ranks.group.group_name}/{ranks.calls}", _get_default_store())
    store.set(str(ranks.rank), json.dumps(record))
    keys = [str(rank) for rank in range(ranks.size)]
    end = time.monotonic() + ranks.deadline.total_seconds()
    for key in keys:
        try:
            store.wait([key], timedelta(seconds=max(end - time.monotonic(), 0.1)))
        except RuntimeError as error:  # not every store raises DistStoreError
            raise RankDisagreement(
                f"rank {ranks.rank} waited {ranks.deadline.total_seconds():g} s for rank {key}, which did not announce "
                f"call {ranks.calls} of this group: it died, is late, or makes a call with a configuration that all "
                f"ranks agreed on before, unlike this rank, whose is {record}"
            ) from error
    records = [json.loads(store.get(key)) for key in keys]
    if store.add("read", 1) == ranks.size:  # the last reader tidies up: a store may outlive the group
        for key in (*keys, "read"):
            store.delete_key(key)
    return records


def by_value(values: list[Field]) -> str:
    """Who has what.

    Example:
        >>> by_value(["zigzag", "striped", "zigzag"])
        "'zigzag' on rank 0, 2 and 'striped' on rank 1"
    """
    distinct = list(dict.fromkeys(values))
    return " and ".join(
        f"{value!r} on rank {', '.join(str(rank) for rank, other in enumerate(values) if other == value)}"
        for value in distinct
    )


def agree(ranks: Ranks, record: Record, refusal: Exception | None) -> list[Record]:
    """Compares configurations over all ranks; returns all records when they are equal and nobody refused.

    Args:
        record: field names and values. Every field must be equal on all ranks but those in `OF_EACH_RANK`.
        refusal: why this rank cannot take its inputs; it is raised here, and reported on all other ranks.

    Raises:
        RankDisagreement: names rank, field, the values and what to do.
    """
    if ranks.size == 1:
        if refusal is not None:
            raise refusal
        return [record]
    records = exchange_records(ranks, {"refusal": f"{type(refusal).__name__}: {refusal}"} if refusal else record)
    if refusal is not None:
        raise refusal
    refusals = [
        f"rank {rank} refused its inputs: {other['refusal']}"
        for rank, other in enumerate(records)
        if "refusal" in other
    ]
    if refusals:
        raise RankDisagreement("nothing was computed, " + "; ".join(refusals))
    for field in record:
        values = [other.get(field, "nothing") for other in records]
        if field in OF_EACH_RANK or len(set(values)) == 1:
            continue
        if field == "seq_len":
            tokens = sum(int(other["tokens"]) for other in records)
            advice = f"the shards hold {tokens} tokens in all: if they are one sequence, pass seq_len={tokens}"
        elif field == "version":
            advice = "install the same ringattn on every rank"
        else:
            advice = f"make {field} the same on every rank"
        raise RankDisagreement(f"nothing was computed, ranks disagree: {field} is {by_value(values)}; {advice}")
    return records
