"""A deadline for GPUs: who did not come is named, and all that has not come is given up, waited for or not."""

import time

import pytest
import torch

from ringattn.transport.interface import TransportError
from ringattn.transport.watch import LOOKS, Watch

pytestmark = pytest.mark.timeout(30)
DEADLINE = 0.5


class Event:
    """Of a GPU that gets nowhere, unless `there`."""

    there = False

    def record(self):
        pass

    def query(self):
        return self.there


@pytest.fixture
def given_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return []


def test_what_has_not_come_is_given_up(given_up):
    watch = Watch(3, DEADLINE, given_up.extend)
    first, second = torch.zeros(2), torch.ones(3)
    watch.expect("rank 1", [first]).follow()
    watch.expect("rank 2", [second])
    watch.check()
    time.sleep(1.5 * DEADLINE)
    assert [x is y for x, y in zip(given_up, (first, second), strict=True)] == [True, True]
    with pytest.raises(TransportError, match=r"rank 3 waited 0\.5 s for rank 1"):
        watch.check()


def test_what_has_come_is_forgotten(given_up, monkeypatch):
    monkeypatch.setattr(Event, "there", True)
    watch = Watch(0, DEADLINE, given_up.extend)
    for _ in range(3):
        watch.expect("rank 1", [torch.zeros(2)]).follow()
    time.sleep(3 * DEADLINE / LOOKS + 0.1)
    assert not watch._pending
    assert not given_up
