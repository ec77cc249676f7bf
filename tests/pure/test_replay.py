"""When a call is recorded, and when it is started from its record. What is recorded there: tests/gpu/test_replay.py."""

from typing import Any, cast

import pytest
import torch

from ringattn import replay
from ringattn.executors.call import Call, Schedule


class Recorder:
    """Writes down what it is asked to do."""

    def __init__(self):
        self.generation = self.calls = 0
        self.said: list[str] = []

    def record(self, work):
        self.said.append("record")
        return work

    def replay(self, work):
        self.said.append("replay")
        self.calls += 1
        work()


def call_of(recorder: Recorder) -> Call:
    nothing = cast(Any, None)
    return Call(nothing, 0, nothing, 1.0, None, nothing, cast(Any, recorder))


def run(call: Call, recorder: Recorder, *tensors: torch.Tensor) -> list[str]:
    """What became of a call with such tensors."""
    recorder.said = []

    def work():
        recorder.said.append("work")

    replay.replayed(call, tensors, work)
    return recorder.said


def test_recorded_the_second_time_and_started_from_the_record_after_that():
    recorder = Recorder()
    call, x = call_of(recorder), torch.zeros(4, 6)
    assert run(call, recorder, x) == ["work"]
    assert run(call, recorder, x) == ["record", "replay", "work"]
    recorder.calls += 1  # an even number of calls later
    assert run(call, recorder, x) == ["replay", "work"]


@pytest.mark.parametrize("change", ["address", "strides", "region", "memory"])
def test_anything_else_runs_anew(change):
    recorder = Recorder()
    call, x = call_of(recorder), torch.zeros(6, 6)
    run(call, recorder, x)
    if change == "region":
        recorder.calls += 1
    elif change == "memory":
        recorder.generation += 1
    assert run(call, recorder, {"address": x.clone(), "strides": x.T}.get(change, x)) == ["work"]


def test_tensors_that_never_come_again_are_not_remembered_without_end(monkeypatch):
    monkeypatch.setattr(replay, "MOST", 3)
    recorder = Recorder()
    call, tensors = call_of(recorder), [torch.zeros(4) for _ in range(5)]
    for x in tensors * 2:
        recorder.calls = 0
        run(call, recorder, x)
    assert len(call.replays) == 3
    assert run(call, recorder, tensors[4]) == ["work"]


@pytest.mark.parametrize(("queues", "enough"), [(None, True), ("8", True), ("1", False)])
def test_what_waits_for_others_needs_a_queue_of_its_own(monkeypatch, queues, enough):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if queues:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", queues)
    for recorded in (False, True):
        assert replay.with_room_for_branches(Schedule(replay=recorded)) == Schedule(replay=recorded and enough)
