"""Gangs: what rank 0 returned comes back, and of several failures the first is the one shown."""

import json
import os
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ringattn.launch import gang

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch):
    """Ranks find `tests.launch.jobs`."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def config(**values: str):
    return OmegaConf.create({"parallel": {"device": "cpu"}, **values})


def test_a_gang_of_one_needs_no_process_group(tmp_path: Path):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    told = config(key="${parallel.device}!")
    result = gang.launch("tests.launch.jobs:describe", told, tmp_path / "job", 1)
    assert result == {"key": "cpu!", "size": 1, "device": "cpu", "distributed": False}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "elastic would leave its own"


@pytest.mark.parametrize(
    ("how", "message"), [("raises", "ValueError: rank 1 of 2 fails on purpose"), ("killed", "killed by SIGKILL")]
)
def test_the_rank_that_failed_first_is_shown(tmp_path: Path, how: str, message: str):
    with pytest.raises(gang.GangFailed, match=f"rank 1 failed: {message}") as caught:
        gang.launch("tests.launch.jobs:fail", config(how=how), tmp_path, 2)
    assert ("in fail" in caught.value.traceback) == (how == "raises")


def failure(folder: Path, rank: int, exitcode: int, written: float | None) -> ProcessFailure:
    """A failure as elastic reports it, with an error file written at some time, or without one."""
    path = folder / f"{rank}.json"
    if written is not None:
        told = {"message": f"E: {rank}", "extraInfo": {"py_callstack": "", "timestamp": "7"}}
        path.write_text(json.dumps({"message": told}))
        os.utime(path, (written, written))
    return ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(path))


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ([(1, 7.9), (1, 7.1)], 1),  # the same second: elastic's own choice would be rank 0
        ([(-signal.SIGTERM, None), (1, 7.1)], 1),  # ended by elastic
        ([(1, 7.1), (-signal.SIGKILL, None)], 1),  # out of memory; rank 0 lost its peer
    ],
)
def test_causes_come_before_consequences(tmp_path: Path, failures: list, first: int):
    error = ChildFailedError("gang", {rank: failure(tmp_path, rank, *each) for rank, each in enumerate(failures)})
    assert str(gang._first_failure(error, tmp_path)).startswith(f"rank {first} failed")


@pytest.mark.parametrize(
    ("asked", "ranks", "gpus", "kind"),
    [("cpu", 2, 8, "cpu"), ("auto", 2, 0, "cpu"), ("auto", 2, 2, "cuda"), ("cuda", 1, 1, "cuda")],
)
def test_device(asked: str, ranks: int, gpus: int, kind: str):
    assert gang.choose_device(asked, ranks, gpus)[0] == kind


def test_gpus_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"2 ranks here but 1 GPU, .* use parallel\.ranks=1 or parallel\.device=cpu"):
        gang.choose_device("cuda", 2, 1)
