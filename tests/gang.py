"""Many ranks for a test: real processes and a real backend, started in a fraction of a second.

A fork server that has torch imported already forks each rank. A worker body is a module-level function
`work(rank, *arguments)`; it asserts, and returns plain values. The first rank to fail is the one shown.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["torch._dynamo", "ringattn", "tests.gang", "pytest"]
)  # dynamo: seconds, at the first operator


def ranks_on_gpus() -> tuple[int, str]:
    """How many ranks tests on GPUs have, and over which backend: one on each GPU, or two that take turns with a single
    one, which NCCL would refuse."""
    gpus = torch.cuda.device_count()
    return (gpus, "nccl") if gpus > 1 else (2, "gloo")


def run_ranks(
    ranks: int,
    work: Callable[..., Any],
    *arguments: Any,
    backend: str = "gloo",
    timeout: float = 60,
    dying: tuple[int, ...] = (),
) -> list:
    """Runs `work` on every rank of a fresh process group and returns what each rank returned, in rank order; ranks
    `dying` are expected to die and return None."""
    results, leave = processes.Queue(), processes.Event()
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "store"
        gang = [
            processes.Process(
                target=_rank, args=(rank, ranks, backend, str(meeting), timeout, results, leave, work, arguments)
            )
            for rank in range(ranks)
        ]
        for process in gang:
            process.start()
        try:
            returned = _collect(ranks, gang, results, time.monotonic() + timeout, dying)
            leave.set()
            for process in gang:
                process.join(timeout=5)
            return returned
        finally:
            for process in gang:
                process.kill()
                process.join()


def _collect(ranks: int, gang: list, results: Any, end: float, dying: tuple[int, ...]) -> list:
    returned: dict[int, Any] = dict.fromkeys(dying)
    while len(returned) < ranks:
        try:
            rank, failure, value = results.get(timeout=0.5)
        except queue.Empty:
            dead = [rank for rank, process in enumerate(gang) if process.exitcode and rank not in returned]
            if dead:
                raise AssertionError(f"rank {dead[0]} died with exit code {gang[dead[0]].exitcode}") from None
            if time.monotonic() > end:
                missing = sorted(set(range(ranks)) - returned.keys())
                raise AssertionError(f"ranks {missing} did not finish in time") from None
            continue
        if failure:
            raise AssertionError(f"rank {rank} failed first:\n{failure}")
        returned[rank] = value
    return [returned[rank] for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, backend: str, meeting: str, timeout: float, results: Any, leave: Any, work, arguments
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # ranks that share a GPU
    try:
        dist.init_process_group(
            backend, init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
        )
        value = work(rank, *arguments)
        results.put((rank, None, value))
        leave.wait(timeout)  # a rank that leaves early takes its connections with it
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
