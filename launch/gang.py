"""One gang of ranks per job: started fresh, torn down with it, its first failure shown.

    parent   launch("ringattn.launch.trainer:train", config, folder, ranks) -> what rank 0 returned
    rank     python -m ringattn.launch.gang ringattn.launch.trainer:train FOLDER

A job is a function `(config, folder, place) -> dict`. The parent composes and resolves the config once and
leaves it in the folder, so ranks cannot disagree about it. Every gang has its own rendezvous on a free port
and its own processes: jobs of a sweep inherit nothing from each other, and two of them may run at once.
A gang of one never initialises torch.distributed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

__all__ = ["GangFailed", "Job", "Place", "default_ranks", "joined", "launch"]

Job = Callable[[DictConfig, Path, "Place"], dict[str, Any]]

SETTINGS, RESULT, LOGS = "settings.yaml", "result.json", "ranks"


class GangFailed(RuntimeError):
    """A rank failed. The message says which; `traceback` is that rank's own."""

    def __init__(self, rank: int, what: str, traceback: str, logs: Path) -> None:
        super().__init__(f"rank {rank} failed: {what} (output of every rank: {logs})")
        self.traceback = traceback


@dataclass(frozen=True)
class Place:
    """A rank's place in its gang: its number, its device, and why it got that device."""

    rank: int
    size: int
    device: torch.device
    reason: str


def default_ranks() -> int:
    """One rank per GPU; two on a machine without any, so that there is a ring at all."""
    return torch.cuda.device_count() or 2


def launch(job: str, config: DictConfig, folder: Path, ranks: int) -> dict[str, Any]:
    """Run a job on a fresh gang and wait for it.

    Args:
        job: `module:function`, a `Job`.
        config: composed config; its resolved form is left in the folder for the ranks.
        folder: where the job writes; made if missing.
        ranks: how many processes.

    Returns:
        What the job returned on rank 0.

    Raises:
        GangFailed: a rank failed; carries the traceback of the rank that failed first.
        KeyboardInterrupt: the gang was stopped by a signal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    OmegaConf.save(config, folder / SETTINGS, resolve=True)
    logs = folder / LOGS
    # Rank 0 keeps the terminal, which is what a progress display needs; the others write to files.
    redirects = dict.fromkeys(range(1, ranks), Std.ALL)
    options = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=redirects),
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would report failures before us
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve ranks that share cores: 5x slower
    with _signals_restored():
        try:
            elastic_launch(options, sys.executable)("-u", "-m", "ringattn.launch.gang", job, str(folder))
        except ChildFailedError as error:
            raise _first_failure(error, logs) from None
        except SignalException as error:
            # Elastic's is an ordinary Exception, which a sweep would take for one failed job and go on.
            raise KeyboardInterrupt(f"stopped by {error.sigval.name}") from error
    return json.loads((folder / RESULT).read_text())


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Elastic installs handlers and leaves them there."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _first_failure(error: ChildFailedError, logs: Path) -> GangFailed:
    """The failure that the others followed from.

    Among exceptions, the error file written first (elastic's own timestamps are whole seconds). A rank that a
    signal killed left no file: SIGTERM is how elastic ends the survivors and comes last; anything else, such
    as SIGKILL for want of memory, broke the connections that its peers then complain about, and comes first.
    """

    def order(item: tuple[int, ProcessFailure]) -> float:
        path = Path(item[1].error_file)
        if path.is_file():
            return path.stat().st_mtime
        return math.inf if item[1].exitcode == -signal.SIGTERM else 0.0

    rank, failure = min(error.failures.items(), key=order)
    told: Any = failure.message  # annotated as str, but where there is an error file it is what that holds
    if isinstance(told, dict):
        return GangFailed(rank, told["message"].splitlines()[0], told["extraInfo"]["py_callstack"], logs)
    what = f"killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    return GangFailed(rank, what, "", logs)


@contextmanager
def joined(device: str) -> Iterator[Place]:
    """This process as a rank of the gang that its environment describes (torchrun's variables).

    Args:
        device: auto, cpu or cuda.

    Raises:
        ValueError: cuda was asked for and some rank of this machine would have no GPU of its own.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    kind, reason = choose_device(device, local_size, torch.cuda.device_count())
    if kind == "cuda":
        place = Place(rank, size, torch.device("cuda", local_rank), reason)
        torch.cuda.set_device(place.device)
    else:
        place = Place(rank, size, torch.device("cpu"), reason)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if size == 1:
        yield place
        return
    if kind == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=place.device)
    else:
        dist.init_process_group("gloo")
    yield place
    dist.destroy_process_group()  # not after a failure: it would wait for peers that may never come


def choose_device(request: str, ranks: int, gpus: int) -> tuple[str, str]:
    """(cpu or cuda, why) for `ranks` processes on a machine with `gpus`.

    Example:
        >>> choose_device("auto", ranks=2, gpus=1)
        ('cpu', '2 ranks here but 1 GPU, and NCCL takes one rank per GPU')
    """
    if request == "cpu":
        return "cpu", "asked for"
    enough = f"{ranks} of {gpus} GPUs here, one per rank"
    if gpus >= ranks:
        return "cuda", enough
    lacking = f"{ranks} ranks here but {gpus} GPU{'s' * (gpus != 1)}, and NCCL takes one rank per GPU"
    if request == "cuda":
        raise ValueError(f"parallel.device=cuda: {lacking}; use parallel.ranks={max(gpus, 1)} or parallel.device=cpu")
    return "cpu", lacking if gpus else "no GPU here"


@record
def _member(job: str, folder: Path) -> None:
    """A rank's whole life."""
    module, name = job.split(":")
    function: Job = getattr(import_module(module), name)
    config = OmegaConf.load(folder / SETTINGS)
    assert isinstance(config, DictConfig)
    with joined(config.parallel.device) as place:
        result = function(config, folder, place)
        if place.rank == 0:
            (folder / RESULT).write_text(json.dumps(result))


if __name__ == "__main__":
    try:
        _member(sys.argv[1], Path(sys.argv[2]))
    except Exception:
        if os.environ["RANK"] != "0":
            raise  # into this rank's file; rank 0 has the terminal, where the parent shows the first failure
        sys.exit(1)
