"""A deadline for what a GPU waits for: the host runs ahead of it and cannot wait itself.

Work that needs other ranks is followed by an event. A thread looks whether these events happen in order; when the
oldest one has not happened for as long as the deadline, everything that is still expected is given up, which lets the
GPU go on, and every later call raises. The process survives.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ringattn.transport.interface import TransportError

__all__ = ["Expected", "Watch"]

LOOKS = 50  # in a deadline


class Expected:
    """Tensors that are being filled, and from when on the GPU waits for them."""

    def __init__(self, what: str, tensors: Sequence[Tensor]):
        self.what, self.tensors = what, tensors
        self.event: torch.cuda.Event | None = None
        self.since = 0.0

    def follow(self) -> None:
        """The current stream has them when it gets here."""
        event = torch.cuda.Event()
        event.record()
        self.since = time.monotonic()
        self.event = event  # last: the thread looks at it first


class Watch:
    """Args:
    rank: this rank, for messages.
    deadline: in seconds.
    give_up: is told of all tensors that have not come, and makes the GPU stop waiting.
    """

    def __init__(self, rank: int, deadline: float, give_up: Callable[[Sequence[Tensor]], None]):
        self.rank = rank
        self.deadline = deadline
        self.give_up = give_up
        self.failure: str | None = None
        self._pending: deque[Expected] = deque()
        self._progress = 0.0
        self._thread: threading.Thread | None = None

    def expect(self, what: str, tensors: Sequence[Tensor]) -> Expected:
        """To be called when something starts, and `follow` of what it returns when the GPU shall wait for it."""
        expected = Expected(what, tensors)
        self._pending.append(expected)
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, daemon=True, name="ringattn deadline")
            self._thread.start()
        return expected

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
            while self._pending and self._pending[0].event is not None and self._pending[0].event.query():
                self._pending.popleft()
                self._progress = now
            if self._pending and self._pending[0].event is not None:
                oldest = self._pending[0]
                if now - max(oldest.since, self._progress) > self.deadline:
                    self.failure = (
                        f"rank {self.rank} waited {self.deadline:g} s for {oldest.what}: a rank died, is late or made "
                        "another call; what was computed since is NaN, and this group cannot be used any more"
                    )
                    self.give_up([tensor for expected in list(self._pending) for tensor in expected.tensors])
