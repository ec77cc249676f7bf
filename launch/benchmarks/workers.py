"""Processes that measure: one that hangs or ruins its context is ended, and the bench goes on.

    parent   tell("measure", ...)          hear(timeout) -> what `desk.measure` returned
    worker   a desk: an object whose methods are the commands, one after the other

All share the GPU, only one is told to compute while times are taken, so they can take turns in any order.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["DIED", "SILENT", "Failed", "Worker", "preload", "tensors"]

DIED, SILENT = "its process died", "no answer"  # how two of the reasons begin

processes = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Lets workers start in a moment: what they need is imported once, and no CUDA context is forked."""
    processes.set_forkserver_preload(list(modules))


class Failed(RuntimeError):
    """A worker gave no answer; says why."""


def serve(pipe: Connection, desk: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The life of a worker: answers until told None."""
    torch.set_num_threads(1)
    at_work = desk(*arguments)
    while (message := pipe.recv()) is not None:
        command, *details = message
        try:
            pipe.send((True, getattr(at_work, command)(*details)))
        except Exception as error:  # whatever it is, the parent names it beside the implementation
            pipe.send((False, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"))


class Worker:
    """A process that makes a desk, `desk(*arguments)`, and does what it is told."""

    def __init__(self, desk: Callable[..., Any], *arguments: Any):
        self.pipe, theirs = processes.Pipe()
        self.process = processes.Process(target=serve, args=(theirs, desk, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, command: str, *arguments: Any) -> None:
        """Gives a command; `hear` says if nobody is there to take it."""
        with suppress(ConnectionError):
            self.pipe.send((command, *arguments))

    def hear(self, timeout: float, hopeless: Callable[[], bool] = lambda: False) -> Any:
        """What the command that it was told returned.

        Raises:
            Failed: it raised, died, did not answer within `timeout` seconds, or became `hopeless`, which is asked twice
                a second. End it then.
        """
        end = time.monotonic() + timeout
        try:
            while not self.pipe.poll(min(0.5, max(end - time.monotonic(), 0))):
                if time.monotonic() >= end or hopeless():
                    raise Failed(f"{SILENT} within {timeout:g} s")
            fine, answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            raise Failed(f"{DIED} with exit code {self.process.exitcode}") from None
        if not fine:
            raise Failed(answer)
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.join(10)  # not for ever: the driver may have to wait for a kernel


def tensors(heads: list[np.ndarray], dtype: torch.dtype) -> list[Tensor]:
    """What `Desk.check` returned, as tensors again."""
    return [torch.from_numpy(head).view(dtype) for head in heads]
