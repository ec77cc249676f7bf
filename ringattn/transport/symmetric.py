"""Symmetric memory on the GPUs of one node: every rank's regions mapped into every other's, copied by copy engines.

    meet        write my count into a word of every other rank, wait for their words in mine
    copy        cudaMemcpy(2D)Async between GPUs, on a stream of its own: copy engines, no multiprocessor
    collect     like meet, but the words were written behind the copies

Words only count up and are never reset. What a rank waits for is always a word in its own memory, in a kernel with a
deadline (`await_kernel.py`); nothing else here waits for another rank once the memory is mapped. A copy within one GPU
would run on its multiprocessors, so nothing is copied that is already here.
Source: torch.distributed._symmetric_memory, which maps the memory.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ringattn.transport.interface import WORDS, Mark, Move, TransportError

__all__ = ["SymmetricMemory", "node"]

ALIGNMENT = 1024
MET, NOTIFIED = 0, 1  # two rows of words


def node(device: torch.device) -> str:
    """A name that two ranks share if they may reach each other's memory; empty if this one can reach nobody's."""
    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None or find_spec("cuda") is None:
        return ""
    count = torch.cuda.device_count()
    if not all(torch.cuda.can_device_access_peer(device, other) for other in range(count) if other != device.index):
        return ""
    return socket.gethostname()


class Mapped(NamedTuple):
    """Memory that all ranks reach: mine, what keeps the mapping, and everybody's."""

    mine: Tensor
    handle: object
    of_rank: list[Tensor]


class Engine:
    """What torch has no call for, or a slow one: each of these starts no kernel."""

    def __init__(self) -> None:
        from cuda.bindings import driver, runtime  # pyright: ignore[reportMissingImports]  # torch on CUDA brings them

        self.driver, self.runtime = driver, runtime
        self.any_direction = runtime.cudaMemcpyKind.cudaMemcpyDefault

    def copying(self, destination: Tensor, source: Tensor) -> tuple[Callable[..., Any], tuple]:
        """The call that copies a tensor whose rows are contiguous, and its arguments but for the stream."""
        size = source.element_size()
        addresses = destination.data_ptr(), source.data_ptr()
        if destination.is_contiguous() and source.is_contiguous():
            return self.runtime.cudaMemcpyAsync, (*addresses, source.numel() * size, self.any_direction)
        to, come = addresses
        pitches = to, destination.stride(0) * size, come, source.stride(0) * size
        return self.runtime.cudaMemcpy2DAsync, (*pitches, source[0].numel() * size, source.shape[0], self.any_direction)

    def run(self, operation: Callable[..., Any], *arguments: Any) -> None:
        (error,) = operation(*arguments)
        if error:
            raise TransportError(f"{operation.__name__} failed: {error.name}")

    def write(self, address: int, value: int, stream: int) -> None:
        """A word of 32 bits, after all that the stream holds is visible."""
        self.run(self.driver.cuStreamWriteValue32, stream, address, value, 0)


class SymmetricMemory:
    """One rank's view of the memory of all (`Symmetric`).

    Args:
        group: ranks on one node, each with a GPU of its own.
        device: this rank's.
        deadline: longest wait for another rank.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, deadline: timedelta):
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.deadline = deadline
        self.patience = int(deadline.total_seconds() * 1e9)
        self.meetings = self.notified = self.generation = 0
        self.sizes: tuple[int, ...] = ()
        self.regions: list[Sequence[Tensor]] = []  # of each rank
        self.engine = Engine()
        self.engines = torch.cuda.Stream(device, priority=-1)
        self.start = torch.cuda.Event()
        self.waiting: Any = None
        self.known: dict[int, tuple[Sequence[Move | Mark], list]] = {}
        self.compute = torch.cuda.current_stream(device)
        self.error = torch.zeros(2, dtype=torch.int64).pin_memory()
        self.failed = self.error.numpy()  # the same memory, quicker to look at
        self.late = torch.zeros(1, dtype=torch.int32, device=device)
        self.was_late = torch.zeros(1, dtype=torch.int32).pin_memory()
        self.is_late = self.was_late.numpy()
        self.counts = self.map(2 * self.size * 4)
        self.my_counts = self.counts.mine.view(torch.int32).view(2, self.size)
        self.their_counts = [counts.data_ptr() for counts in self.counts.of_rank]
        self.words = torch.zeros(WORDS, dtype=torch.int32, device=device)
        self.arena: Mapped | None = None
        self.barrier("mapped")

    def map(self, nbytes: int) -> Mapped:
        """New memory, zeroed, of the same size on every rank. Collective."""
        from torch._C._distributed_c10d import _SymmetricMemory
        from torch.distributed._symmetric_memory import rendezvous

        mine = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, self.device)
        mine.zero_()
        torch.cuda.synchronize(self.device)
        handle = rendezvous(mine, self.group)
        return Mapped(mine, handle, [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(self.size)])

    def barrier(self, name: str) -> None:
        """Ranks' hosts wait for each other."""
        torch.cuda.synchronize(self.device)
        store = PrefixStore(f"ringattn/{self.group.group_name}/{name}", _get_default_store())
        store.set(str(self.rank), "here")
        try:
            store.wait([str(rank) for rank in range(self.size)], self.deadline)
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.rank} waited {self.deadline.total_seconds():g} s for all ranks to map memory"
            ) from error

    def reserve(self, sizes: Sequence[int]) -> None:
        """See `Symmetric.reserve`."""
        held = self.sizes or (0,) * len(sizes)
        if all(size <= have for size, have in zip(sizes, held, strict=True)):
            return
        self.sizes = tuple(-(-max(size, have) // ALIGNMENT) * ALIGNMENT for size, have in zip(sizes, held, strict=True))
        self.generation += 1
        self.barrier(f"free/{self.generation}")  # nobody uses the old memory any more
        self.regions, self.arena = [], None
        self.known.clear()
        self.arena = self.map(sum(self.sizes))
        self.regions = [memory.split(self.sizes) for memory in self.arena.of_rank]
        self.barrier(f"mapped/{self.generation}")

    @property
    def nbytes(self) -> int:
        """Bytes reserved on this GPU; torch's allocator does not count them."""
        return sum(self.sizes)

    def release(self) -> None:
        """Gives back what was reserved. Collective."""
        self.generation += 1
        self.barrier(f"free/{self.generation}")
        self.sizes, self.regions, self.arena = (), [], None

    def region(self, rank: int, index: int) -> Tensor:
        """See `Symmetric.region`."""
        return self.regions[rank][index]

    def meet(self) -> None:
        """See `Symmetric.meet`."""
        self.check()
        current = torch.cuda.current_stream(self.device)
        if current != self.compute:  # regions are used in turn in the order of calls, whatever their streams
            current.wait_stream(self.compute)
            self.compute = current
        self.meetings += 1
        self.tell(MET, self.meetings, current.cuda_stream)
        self.hear(MET, self.meetings)

    def tell(self, row: int, count: int, stream: int) -> None:
        """Writes a word of every other rank, behind what the stream holds."""
        for step in range(1, self.size):
            counts = self.their_counts[(self.rank + step) % self.size]
            self.engine.write(counts + 4 * (row * self.size + self.rank), count, stream)

    def hear(self, row: int, count: int) -> None:
        """The current stream waits for a word from every other rank."""
        arguments = self.my_counts[row], self.error, count, self.patience, self.rank, self.size
        with torch.cuda.device(self.device):
            if self.waiting is None:
                from ringattn.transport.await_kernel import await_kernel

                launch: Any = await_kernel[(1,)]
                self.waiting = launch(*arguments, num_warps=1)[(1, 1, 1)]  # what it compiled, which starts quicker
            else:
                self.waiting(*arguments)

    def copy(self, moves: Sequence[Move | Mark], *, notify: bool = False) -> Callable[[], None]:
        """See `Symmetric.copy`."""
        self.start.record(torch.cuda.current_stream(self.device))
        self.engines.wait_event(self.start)
        stream = self.engines.cuda_stream
        for operation, arguments in self.lowered(moves):
            if operation is not None:
                self.engine.run(operation, *arguments, stream)
            else:
                for word in arguments:
                    self.engine.write(word, self.meetings, stream)
        if notify:
            self.notified += 1
            self.tell(NOTIFIED, self.notified, stream)
        done = self.engines.record_event()

        def wait(_keeping: Sequence[Move | Mark] = moves) -> None:
            """Memory that is copied from must not be given back, and used for something else, before."""
            torch.cuda.current_stream(self.device).wait_event(done)

        return wait

    def lowered(self, moves: Sequence[Move | Mark]) -> list[tuple[Callable[..., Any] | None, tuple]]:
        """Calls and arguments; None with the addresses of words to mark. Kept for a tuple, which cannot change."""
        known = self.known.get(id(moves))
        if known is not None:
            return known[1]
        calls: list[tuple[Callable[..., Any] | None, tuple]] = []
        for move in moves:
            if isinstance(move, Move):
                calls.append(self.engine.copying(*move))
            else:
                calls.append((None, tuple(move.words.data_ptr() + 4 * index for index in range(move.words.numel()))))
        if isinstance(moves, tuple):
            self.known[id(moves)] = moves, calls  # held, so that nothing else gets its id
        return calls

    def confirm(self) -> None:
        """See `Symmetric.confirm`."""
        operation, arguments = self.engine.copying(self.was_late, self.late)
        self.engine.run(operation, *arguments, torch.cuda.current_stream(self.device).cuda_stream)

    def collect(self) -> None:
        """See `Symmetric.collect`."""
        self.hear(NOTIFIED, self.notified)

    def check(self) -> None:
        """Raises if a wait before now ran into the deadline.

        Raises:
            TransportError: says for whom.
        """
        if self.is_late[0]:
            raise TransportError(
                f"rank {self.rank} waited {self.deadline.total_seconds():g} s for its own copy engines; what was "
                "computed since is wrong, and this group cannot be used any more"
            )
        missing = int(self.failed[0])
        if missing:
            peers = [rank for rank in range(self.size) if missing >> rank & 1]
            raise TransportError(
                f"rank {self.rank} waited {self.deadline.total_seconds():g} s for ranks {peers} to come to step "
                f"{self.failed[1]}: a rank died, is late or made another call; what was computed since is wrong, "
                "and this group cannot be used any more"
            )
