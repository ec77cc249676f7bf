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
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..gang import Place
from .workers import DIED, SILENT, Failed, Worker

__all__ = ["Crew"]


class Crew:
    """Workers on the first `size` ranks. Every method is collective over all ranks of the gang."""

    def __init__(self, station: Callable[..., Any], place: Place, size: int, patience: float):
        self.station, self.place, self.size, self.patience = station, place, size, patience
        self.attempt = 0
        self.worker: Worker | None = None
        # Where the workers meet, and where a rank says that its worker has failed and others wait in vain.
        host, wait = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=patience)
        if place.rank == 0:
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
            self.share(store.port)
        else:
            store = TCPStore(host, self.share(None)[0], is_master=False, timeout=wait)
        self.store = store

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
        fine, answer, failed = True, None, f"{self.attempt} failed"
        if self.place.rank < self.size:
            if self.worker is None:
                where = (self.store.host, self.store.port, self.attempt)
                self.worker = Worker(self.station, self.place.rank, self.size, self.place.device, where, self.patience)
            self.worker.tell(command, *arguments)
            try:
                answer = self.worker.hear(self.patience, lambda: self.store.check([failed]))
            except Failed as failure:
                self.store.set(failed, "")
                fine, answer = False, str(failure)
        answers = self.share((fine, answer))[: self.size]
        failures = {rank: answer for rank, (fine, answer) in enumerate(answers) if not fine}
        if not failures:
            return [answer for _, answer in answers]
        self.end()
        first = min(failures, key=lambda rank: (blame(failures[rank]), rank))
        alike = len(failures) == self.size and len(set(failures.values())) == 1
        raise Failed(failures[first] + (" on every rank" if alike else f" on rank {first}"))

    def end(self) -> None:
        """Ends the workers; the next command finds new ones."""
        if self.worker is not None:
            self.worker.end()
            self.worker = None
        self.attempt += 1


def blame(reason: str) -> int:
    """Who died is to blame first; who got no answer was left waiting, and who raised may have been."""
    return 0 if reason.startswith(DIED) else 2 if reason.startswith(SILENT) else 1
