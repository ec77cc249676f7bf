"""A process for each implementation: a kernel that hangs or ruins its context is ended, and the others go on.

    parent   tell("measure", ...)          hear(timeout) -> what `Desk.measure` returned
    worker   a Desk: the implementation, the inputs of one case, one command after the other

All share the GPU, only one is told to compute while times are taken, so they can take turns in any order.
"""

from __future__ import annotations

import multiprocessing
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..oracle import Case, Inputs, Result, make_inputs
from .implementations import Implementation, Saved
from .timing import FLUSH_BYTES, samples_ms
from .truth import one_head

__all__ = ["Desk", "Failed", "Worker", "preload", "tensors"]

processes = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Lets workers start in a moment: torch is imported once, and no CUDA context is forked."""
    processes.set_forkserver_preload([__name__])


class Failed(RuntimeError):
    """An implementation gave no answer; says why."""


class Desk:
    """What happens in the worker's process."""

    def __init__(self, implementation: Implementation, device: torch.device):
        self.implementation = implementation
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def load(self, case: Case, seed: int) -> str | None:
        """Makes the inputs; returns why the implementation refuses them, if it does."""
        self.drop()
        self.case, inputs = case, make_inputs(case, seed, self.device)
        refusal = self.implementation.refuses(inputs, case)
        self.x: Inputs = self.implementation.prepare(inputs) if refusal is None else inputs
        return refusal

    def check(self, batch: int, group: int) -> list[np.ndarray]:
        """One key/value head of out, dq, dk and dv, as bytes; raises if anything anywhere is not finite."""
        self.poison()
        saved = self.implementation.forward(self.x, self.case)
        parts = [saved[0].detach(), *self.implementation.backward(self.x, saved, self.case)]
        result = Result(*(self.implementation.turned(part) for part in parts))
        for name, part in zip(Result._fields, result, strict=True):
            if not part.isfinite().all():
                raise ValueError(f"{name} holds values that are not finite")
        heads = one_head(result, batch, group, self.case.kv_heads)
        return [head.cpu().contiguous().view(torch.uint8).numpy() for head in heads]

    def poison(self) -> None:
        """Leaves NaN in the memory that outputs will be allocated from."""
        dtype = torch.promote_types(self.case.dtype, torch.float32)
        poisoned = [torch.full_like(x, torch.nan, dtype=dtype) for x in self.x]
        del poisoned

    def measure(self, which: str, budget_ms: float, least: int, most: int) -> tuple[list[float], float | None]:
        """Milliseconds of each call, and the most memory that was allocated, in GiB."""
        implementation, x, case = self.implementation, self.x, self.case
        saved: Saved = () if which == "forward+backward" else implementation.forward(x, case)
        work = {
            "forward": lambda: implementation.forward(x, case),
            "backward": lambda: implementation.backward(x, saved, case),
            "forward+backward": lambda: implementation.backward(x, implementation.forward(x, case), case),
        }[which]
        if self.device.type != "cuda":
            return samples_ms(work, self.device, budget_ms, least, most), None
        torch.cuda.reset_peak_memory_stats()
        times = samples_ms(work, self.device, budget_ms, least, most)
        return times, (torch.cuda.max_memory_allocated() - FLUSH_BYTES) / 2**30

    def drop(self) -> None:
        """Gives the memory of a case back."""
        self.x = None  # pyright: ignore[reportAttributeAccessIssue]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def serve(pipe: Connection, implementation: Implementation, device: torch.device) -> None:
    """The life of a worker: answers until told None."""
    torch.set_num_threads(1)
    desk = Desk(implementation, device)
    while (message := pipe.recv()) is not None:
        command, *arguments = message
        try:
            pipe.send((True, getattr(desk, command)(*arguments)))
        except Exception as error:  # whatever it is, the parent names it beside the implementation
            pipe.send((False, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"))


class Worker:
    """An implementation in a process of its own."""

    def __init__(self, implementation: Implementation, device: torch.device):
        self.pipe, theirs = processes.Pipe()
        self.process = processes.Process(target=serve, args=(theirs, implementation, device), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, command: str, *arguments: Any) -> None:
        """Gives a command; `hear` says if nobody is there to take it."""
        with suppress(ConnectionError):
            self.pipe.send((command, *arguments))

    def hear(self, timeout: float) -> Any:
        """What the command that it was told returned.

        Raises:
            Failed: it raised, died, or did not answer within `timeout` seconds. End it then.
        """
        try:
            if not self.pipe.poll(timeout):
                raise Failed(f"no answer within {timeout:g} s")
            fine, answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            raise Failed(f"its process died with exit code {self.process.exitcode}") from None
        if not fine:
            raise Failed(answer)
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.join(10)  # not for ever: the driver may have to wait for a kernel


def tensors(heads: list[np.ndarray], dtype: torch.dtype) -> list[Tensor]:
    """What `Desk.check` returned, as tensors again."""
    return [torch.from_numpy(head).view(dtype) for head in heads]
