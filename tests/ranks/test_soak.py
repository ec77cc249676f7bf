"""Steps of mixed shapes with random delays over gloo, and the death of a rank."""

from datetime import timedelta

import pytest

from ringattn import ranks
from tests.gang import run_ranks
from tests.soak import die_in_the_middle, soak

pytestmark = pytest.mark.timeout(120)


def test_soak():
    run_ranks(3, soak, "cpu", ("ring", "gather"), 60)


def die_soon(rank: int, executor: str, where: str) -> str:
    ranks.DEADLINE = timedelta(seconds=2)
    return die_in_the_middle(rank, "cpu", executor, 2.0, where)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("executor", ["ring", "gather"])
def test_others_raise_when_a_rank_dies(executor, where):
    said = run_ranks(3, die_soon, executor, where, timeout=60, dying=(2,))
    assert all("a rank died" in message for message in said[:-1]), said
