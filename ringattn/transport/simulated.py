"""Many ranks in one process: each is a thread, and a message is a tensor in a queue.

The executors run on it unchanged, so the whole ring can be tested, and its error studied for any number of
ranks, on one device.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from ringattn.transport.interface import Message, TransportError

__all__ = ["SimulatedTransport", "simulate"]

T = TypeVar("T")


class SimulatedTransport:
    """One rank's end of a network of queues."""

    def __init__(self, rank: int, network: dict[tuple[int, int], queue.Queue[Tensor]], deadline: float):
        self.rank = rank
        self.network = network
        self.deadline = deadline

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """See `Transport.exchange`."""
        for message in sends:
            self.network[self.rank, message.peer].put(message.tensor.clone())

        def wait() -> None:
            for message in receives:
                try:
                    message.tensor.copy_(self.network[message.peer, self.rank].get(timeout=self.deadline))
                except queue.Empty:
                    raise TransportError(
                        f"rank {self.rank} got nothing from rank {message.peer} within {self.deadline:g} s"
                    ) from None

        return wait


def simulate(ranks: int, work: Callable[[int, SimulatedTransport], T], deadline: float = 60.0) -> list[T]:
    """Runs `work(rank, transport)` for every rank at once and returns what each returned; the first rank that
    failed raises."""
    network: dict[tuple[int, int], queue.Queue[Tensor]] = {
        (source, peer): queue.Queue() for source in range(ranks) for peer in range(ranks)
    }
    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(work, rank, SimulatedTransport(rank, network, deadline)) for rank in range(ranks)]
        return [future.result() for future in futures]
