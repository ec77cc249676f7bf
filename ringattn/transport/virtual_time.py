"""Virtual time: ranks that are threads of one process, run one at a time in the order of a seeded clock.

A rank runs until it waits; then whatever comes next in virtual time happens: something in flight arrives, another
rank goes on, or a deadline passes. Delays and ties are drawn from one seed, so a run repeats exactly, and a
minute of waiting costs nothing.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

from ringattn.transport.interface import TransportError

__all__ = ["Clock", "RankDied"]


class RankDied(BaseException):
    """Ends the thread of a rank whose time has come; no handler for errors catches it."""


class Clock:
    """Who may run, and when it is for each rank.

    Args:
        ranks: how many.
        seed: of every random choice.
        pause: longest random delay, in seconds, that a rank takes before it waits for something.
        deaths: rank -> time from which it does nothing any more.
        deadline: longest wait, in seconds.
    """

    def __init__(self, ranks: int, seed: int, pause: float, deaths: dict[int, float], deadline: float):
        self.random = random.Random(seed)
        self.pause = pause
        self.deaths = deaths
        self.deadline = deadline
        self.now = [0.0] * ranks
        self._turn = [threading.Semaphore(0) for _ in range(ranks)]
        self._yielded = threading.Semaphore(0)
        self._waiting: dict[int, tuple[Callable[[], bool], float]] = {}
        self._events: list[tuple[float, float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._ties = [0.0] * ranks

    def dead(self, rank: int, time: float) -> bool:
        return time >= self.deaths.get(rank, float("inf"))

    def at(self, time: float, event: Callable[[], None]) -> None:
        """Has `event` happen at that time."""
        heapq.heappush(self._events, (time, self.random.random(), next(self._count), event))

    def wait(self, rank: int, ready: Callable[[], bool], who: Callable[[], str]) -> None:
        """The rank goes on once `ready`.

        Raises:
            TransportError: it was not, within the deadline; `who` says who is to blame.
        """
        self.now[rank] += self.random.uniform(0, self.pause)
        self._ties[rank] = self.random.random()
        self._waiting[rank] = ready, self.now[rank] + self.deadline
        self._yielded.release()
        self._turn[rank].acquire()
        if self.dead(rank, self.now[rank]):
            raise RankDied
        if not ready():
            raise TransportError(f"rank {rank} waited {self.deadline:g} s for {who()}: a rank died or is late")

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Runs `work(rank)` for all ranks; what each returned, or the exception that ended it."""
        outcomes: list[Any] = [None] * len(self.now)

        def live(rank: int) -> None:
            self._turn[rank].acquire()
            try:
                outcomes[rank] = work(rank)
            except (Exception, RankDied) as error:
                outcomes[rank] = error
            self._waiting.pop(rank, None)
            self._yielded.release()

        threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(len(self.now))]
        for rank, thread in enumerate(threads):
            self._waiting[rank] = (lambda: True), float("inf")
            thread.start()
        while self._waiting:
            self._step()
        for thread in threads:
            thread.join()
        return outcomes

    def _step(self) -> None:
        """The next thing that happens."""
        moments = []
        for rank, (ready, expiry) in self._waiting.items():
            time = self.now[rank] if ready() else max(expiry, self.now[rank])
            moments.append((time, self._ties[rank], rank))
        time, _, rank = min(moments)
        if self._events and self._events[0][0] <= time:
            time, _, _, event = heapq.heappop(self._events)
            waiting = [r for r, (ready, _) in self._waiting.items() if not ready()]
            event()
            for r in waiting:
                if self._waiting[r][0]():
                    self.now[r] = max(self.now[r], time)
            return
        self.now[rank] = time
        del self._waiting[rank]
        self._turn[rank].release()
        self._yielded.acquire()
