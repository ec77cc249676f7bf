"""A process for each rank beside the ranks themselves, replaced when anything goes wrong in it.

    rank r of the gang          ask("examine", ...)  ->  what every rank's station answered, on every rank
    its worker                  a station of a process group of its own

What hangs or dies on one rank leaves the others waiting for it. Then all workers are ended and new ones meet, so a
kernel or a collective that never returns costs the bench some seconds, and its name is known.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore

from ..gang import Place
from .workers import Failed, Worker

__all__ = ["Crew"]


class Crew:
    """Workers on the first `size` ranks. Every method is collective over all ranks of the gang."""

    def __init__(self, station: Callable[..., Any], place: Place, size: int, patience: float):
        self.station, self.place, self.size, self.patience = station, place, size, patience
        self.store: TCPStore | None = None  # where the workers meet; rank 0 keeps it
        self.attempt = 0
        self.worker: Worker | None = None
        self.host = os.environ.get("MASTER_ADDR", "localhost")
        if place.rank == 0:
            wait = timedelta(seconds=patience)
            self.store = TCPStore(self.host, 0, is_master=True, wait_for_workers=False, timeout=wait)
        self.port = self.share(self.store.port if self.store else None)[0]

    def share(self, mine: Any) -> list[Any]:
        """What each rank has, on all ranks."""
        if self.place.size == 1:
            return [mine]
        everybody: list[Any] = [None] * self.place.size
        dist.all_gather_object(everybody, mine)
        return everybody

    def ask(self, command: str, *arguments: Any) -> list[Any]:
        """What the stations of all members answer, in rank order.

        Raises:
            Failed: on every rank, if any member failed; the workers that follow know nothing of what was before.
        """
        fine, answer = True, None
        if self.place.rank < self.size:
            if self.worker is None:
                where = (self.host, self.port, self.attempt)
                self.worker = Worker(self.station, self.place.rank, self.size, self.place.device, where, self.patience)
            self.worker.tell(command, *arguments)
            try:
                answer = self.worker.hear(self.patience)
            except Failed as failure:
                fine, answer = False, str(failure)
        answers = self.share((fine, answer))[: self.size]
        failures = {rank: answer for rank, (fine, answer) in enumerate(answers) if not fine}
        if not failures:
            return [answer for _, answer in answers]
        self.end()
        waiting = {rank for rank, reason in failures.items() if reason.startswith("no answer")}
        causes = failures.keys() - waiting or failures.keys()  # who waits has been left waiting, if anybody fell
        first = min(causes)
        everywhere = " on every rank" if len(failures) == self.size and len(set(failures.values())) == 1 else ""
        raise Failed(failures[first] + (everywhere or f" on rank {first}"))

    def end(self) -> None:
        """Ends the workers; the next command finds new ones."""
        if self.worker is not None:
            self.worker.end()
            self.worker = None
        self.attempt += 1
