"""A deadline for what a GPU waits for: the host runs ahead of it and cannot wait itself.

Work that needs other ranks is followed by an event. A thread looks whether these events happen in order; when the
oldest one has not happened for as long as the deadline, it cancels the work, which lets the GPU go on with wrong
numbers, and every later call raises. The process survives.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from ringattn.transport.interface import TransportError

__all__ = ["Watch"]

LOOKS = 50  # in a deadline


class Watch:
    """Args:
    rank: this rank, for messages.
    deadline: in seconds.
    cancel: makes the GPU stop waiting.
    """

    def __init__(self, rank: int, deadline: float, cancel: Callable[[], None]):
        self.rank = rank
        self.deadline = deadline
        self.cancel = cancel
        self.failure: str | None = None
        self._pending: deque[tuple[torch.cuda.Event, float, str]] = deque()
        self._progress = 0.0
        self._thread: threading.Thread | None = None

    def follow(self, what: str) -> None:
        """Expects the current stream to get here."""
        event = torch.cuda.Event()
        event.record()
        self._pending.append((event, time.monotonic(), what))
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, daemon=True, name="ringattn deadline")
            self._thread.start()

    def check(self) -> None:
        """Raises if a deadline has passed.

        Raises:
            TransportError: says who waited for what.
        """
        if self.failure is not None:
            raise TransportError(self.failure)

    def _look(self) -> None:
        while self.failure is None:
            time.sleep(self.deadline / LOOKS)
            now = time.monotonic()
            while self._pending and self._pending[0][0].query():
                self._pending.popleft()
                self._progress = now
            if self._pending:
                _, since, what = self._pending[0]
                if now - max(since, self._progress) > self.deadline:
                    self.failure = (
                        f"rank {self.rank} waited {self.deadline:g} s for {what}: a rank died, is late or made another "
                        "call; what was computed since is wrong, and this group cannot be used any more"
                    )
                    self.cancel()
