"""Many ranks in one process, in virtual time: the executors run on it unchanged.

Whatever is in flight arrives in an order drawn from a seed, and it is made to hurt: bytes are read at the moment
they arrive, so a sender that overwrites them early is found out; a tensor that waits to be filled holds NaN, so a
reader that does not wait is, too. Messages can be lost, ranks can die, and bytes are counted.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ringattn.transport.interface import ROWS, WORDS, Mark, Message, Move, Step, TransportError
from ringattn.transport.virtual_time import Clock

__all__ = ["Network", "SimulatedTransport", "simulate"]

T = TypeVar("T")


def contiguous(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.is_contiguous(), f"got strides {tensor.stride()} of {tuple(tensor.shape)}; send contiguous memory"


def spoil(tensor: Tensor) -> None:
    """Fills with bytes that are NaN in every floating dtype."""
    for row in tensor if tensor.numel() else ():
        row.view(-1).view(torch.uint8).fill_(0xFF)


@dataclass
class Network:
    """What connects the ranks, and what goes wrong.

    Args:
        seed: of all delays.
        latency, bandwidth: of everything that travels, in seconds and bytes a second.
        spread: how many times longer than that something may take.
        pause: longest random delay of a rank before it waits for something.
        deadline: longest wait for others, in seconds.
        deaths: rank -> virtual time from which it does nothing any more; what it had sent and not arrived is lost.
        lost: (sender, receiver) -> how many of the first messages between them never arrive.
    """

    seed: int = 0
    latency: float = 5e-6
    bandwidth: float = 2e11
    spread: float = 10.0
    pause: float = 1e-4
    deadline: float = 60.0
    deaths: dict[int, float] = field(default_factory=dict)
    lost: dict[tuple[int, int], int] = field(default_factory=dict)
    bytes_sent: Counter[tuple[int, int]] = field(default_factory=Counter)  # (from, to), filled in by a run

    def run(self, ranks: int, work: Callable[[int, SimulatedTransport], Any]) -> list[Any]:
        """What `work(rank, transport)` returned on each rank, or the exception that ended it."""
        clock = Clock(ranks, self.seed, self.pause, self.deaths, self.deadline)
        ends: list[SimulatedTransport] = []
        ends += [SimulatedTransport(rank, clock, self, ends) for rank in range(ranks)]
        return clock.run(lambda rank: work(rank, ends[rank]))


class SimulatedTransport:
    """One rank's end of a network: messages (`Transport`), and memory that all ranks reach (`Symmetric`)."""

    processors = 0

    def __init__(self, rank: int, clock: Clock, network: Network, ends: list[SimulatedTransport]):
        self.rank = rank
        self.clock = clock
        self.network = network
        self.ends = ends
        self.last_arrival = 0.0
        self.inbox: dict[int, deque[Tensor]] = {}
        self.wanted: dict[int, deque[tuple[Tensor, Callable[[], None]]]] = {}
        self.calls = self.generation = self.reserved = 0
        self.count = torch.zeros(1, dtype=torch.int32)
        self.last = 0.0  # when all that was put will have arrived
        self.leaving = 0  # copies under way
        self.regions: list[Tensor] = []
        self.retired: list[Tensor] = []  # regions before they moved
        self.my_words = torch.zeros(ROWS, WORDS, dtype=torch.int32)
        self.patience = int(network.deadline * 1e9)
        self.late = torch.zeros(1, dtype=torch.int32)

    def travel(
        self, sender: int, receiver: int, nbytes: int | None, arrive: Callable[[], None], after: float = 0.0
    ) -> float:
        """Has `arrive` happen when so many bytes have come from one rank to the other, or, if it is None, right behind
        what comes before; returns when."""
        network, clock = self.network, self.clock
        if nbytes is None:
            nbytes, time = 0, math.nextafter(max(clock.now[self.rank], after), math.inf)
        else:
            duration = (network.latency + nbytes / network.bandwidth) * clock.random.uniform(1, network.spread)
            time = max(clock.now[self.rank], after) + duration
        if sender != receiver:
            network.bytes_sent[sender, receiver] += nbytes
        if network.lost.get((sender, receiver), 0) > 0:
            network.lost[sender, receiver] -= 1
        else:
            clock.at(time, lambda: None if clock.dead(self.rank, time) else arrive())
        return time

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], *, narrow: bool = False
    ) -> Callable[[], None]:
        """See `Transport.exchange`."""
        contiguous(*(message.tensor for message in (*sends, *receives)))
        pending: set[tuple[str, int]] = set()
        for number, message in enumerate(receives):
            spoil(message.tensor)
            self.receive(message, number, pending)
        for number, message in enumerate(sends):
            self.send(message, number, pending)

        def wait() -> None:
            peers = [("send", sends), ("receive", receives)]
            self.clock.wait(
                self.rank,
                lambda: not pending,
                lambda: " and ".join(
                    f"{verb}s with {sorted({messages[n].peer for kind, n in pending if kind == verb})}"
                    for verb, messages in peers
                    if any(kind == verb for kind, _ in pending)
                ),
            )

        return wait

    def send(self, message: Message, number: int, pending: set[tuple[str, int]]) -> None:
        other = self.ends[message.peer]
        pending.add(("send", number))

        def arrive() -> None:
            pending.discard(("send", number))
            waiting = other.wanted.setdefault(self.rank, deque())
            if waiting:
                tensor, done = waiting.popleft()
                tensor.copy_(message.tensor)
                done()
            else:
                other.inbox.setdefault(self.rank, deque()).append(message.tensor.clone())

        nbytes = message.tensor.numel() * message.tensor.element_size()
        self.last_arrival = self.travel(self.rank, message.peer, nbytes, arrive, self.last_arrival)

    def receive(self, message: Message, number: int, pending: set[tuple[str, int]]) -> None:
        here = self.inbox.setdefault(message.peer, deque())
        if here:
            message.tensor.copy_(here.popleft())
            return
        pending.add(("receive", number))
        wanted = self.wanted.setdefault(message.peer, deque())
        wanted.append((message.tensor, lambda: pending.discard(("receive", number))))

    def all_gather(self, moves: Sequence[Move]) -> Callable[[], None]:
        """See `Transport.all_gather`."""
        peers = range(len(self.ends))
        for destination, source in moves:
            destination[self.rank].copy_(source)
        return self.exchange(
            [Message(source, peer) for _, source in moves for peer in peers if peer != self.rank],
            [Message(destination[peer], peer) for destination, _ in moves for peer in peers if peer != self.rank],
        )

    def reserve(self, sizes: Sequence[int]) -> None:
        """See `Symmetric.reserve`."""
        have = [x.numel() for x in self.regions] + [0] * (len(sizes) - len(self.regions))
        if not self.regions or any(size > held for size, held in zip(sizes, have, strict=True)):
            self.barrier()
            self.generation += 1
            self.retired += self.regions
            self.regions = [
                torch.zeros(max(size, held), dtype=torch.uint8) for size, held in zip(sizes, have, strict=True)
            ]
            self.barrier()

    def barrier(self) -> None:
        """All ranks come here before any goes on, in no time."""
        self.reserved += 1

        def absent() -> list[int]:
            return [end.rank for end in self.ends if end.reserved < self.reserved]

        self.clock.wait(self.rank, lambda: not absent(), lambda: f"ranks {absent()} to reserve memory")

    def region(self, rank: int, index: int) -> Tensor:
        """See `Symmetric.region`."""
        return self.ends[rank].regions[index]

    def words(self, rank: int) -> Tensor:
        """See `Symmetric.words`."""
        return self.ends[rank].my_words

    def begin(self, marks: Sequence[Mark] = ()) -> None:
        """See `Symmetric.begin`."""
        self.calls += 1
        self.count.fill_(self.calls)
        for mark in marks:  # which wait for no copies
            self.show(mark)

    def mark(self, marks: Sequence[Mark]) -> None:
        """See `Symmetric.mark`."""
        self.copy(marks)

    def copy(self, puts: Sequence[Step], tensors: Sequence[Tensor] = ()) -> None:
        """See `Symmetric.copy`."""
        for put in puts:
            if isinstance(put, Mark):
                self.last = self.show(put, self.last)
                continue
            source = tensors[put.number][put.part]
            contiguous(*put.destination, *source)
            spoil(put.destination)
            nbytes = source.numel() * source.element_size()
            arrives = self.travel(self.rank, self.owner(put.destination), nbytes, self.filling(put.destination, source))
            self.last = max(self.last, arrives)

    def show(self, mark: Mark, after: float = 0.0) -> float:
        """Words are on their way, and come after some time; when."""
        fill = self.filling(mark.words, torch.tensor(self.calls))
        return self.travel(self.rank, self.owner(mark.words), None, fill, after)

    def filling(self, destination: Tensor, source: Tensor) -> Callable[[], None]:
        """What happens when a copy arrives."""
        self.leaving += 1

        def arrive() -> None:
            destination.copy_(source)
            self.leaving -= 1

        return arrive

    def hear(self, row: int, poison: Tensor) -> None:
        """See `Symmetric.hear`."""

        def missing() -> list[int]:
            words = self.my_words[row, : len(self.ends)].tolist()
            return [peer for peer, word in enumerate(words) if peer != self.rank and word < self.calls]

        self.clock.wait(self.rank, lambda: not missing(), lambda: f"ranks {missing()}")

    def finish(self) -> None:
        """See `Symmetric.finish`."""
        self.clock.wait(self.rank, lambda: not self.leaving, lambda: f"{self.leaving} copies")

    def owner(self, tensor: Tensor) -> int:
        """Whose memory a tensor lies in."""
        storage = tensor.untyped_storage().data_ptr()
        assert all(x.untyped_storage().data_ptr() != storage for end in self.ends for x in end.retired), "memory moved"
        own = ((end.rank, (*end.regions, end.my_words)) for end in self.ends)
        owners = (rank for rank, memory in own if any(x.untyped_storage().data_ptr() == storage for x in memory))
        return next(owners, self.rank)


def simulate(ranks: int, work: Callable[[int, SimulatedTransport], T], network: Network | None = None) -> list[T]:
    """Runs `work(rank, transport)` for every rank and returns what each returned. If ranks failed, one of them raises:
    one that did not just wait for another, if there is one."""
    outcomes = (network or Network()).run(ranks, work)
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if failures:
        raise min(failures, key=lambda failure: isinstance(failure, TransportError))
    return outcomes
