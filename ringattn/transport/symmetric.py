"""Symmetric memory on the GPUs of one node: every rank's regions mapped into every other's, filled by copy engines, and
by kernels.

    copy        cudaMemcpy(2D)Async from this GPU into the others, on a stream of its own: copy engines, no
                multiprocessor; words of theirs are written behind the copies
    mark        words of other ranks are written from the stream of the compute, behind what it has stored itself
    hear        a kernel of one warp looks at words of this rank's, until the deadline (`await_kernel.py`)

Words hold the number of a call and are never reset. Nothing else here waits for another rank once the memory is mapped.
A copy within one GPU would run on its multiprocessors, so nothing is copied that stays here.
Source: torch.distributed._symmetric_memory, which maps the memory.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ringattn.transport.engine import Engine, Operation, Recording
from ringattn.transport.interface import ROWS, WORDS, Mark, Put, Step, TransportError

__all__ = ["SymmetricMemory", "node"]

ALIGNMENT = 1024
KNOWN = 1024  # lists of copies and of words that are remembered
BY_A_KERNEL = -1  # found to be late, in place of a set of ranks


def node(device: torch.device) -> str:
    """A name that two ranks share if they may reach each other's memory; empty if this one can reach nobody's."""
    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None or find_spec("cuda") is None:
        return ""
    count = torch.cuda.device_count()
    if not all(torch.cuda.can_device_access_peer(device, other) for other in range(count) if other != device.index):
        return ""
    return socket.gethostname()


class Mapped(NamedTuple):
    """Memory that all ranks reach: what keeps the mapping, and everybody's, mine among them."""

    handle: object
    of_rank: list[Tensor]


class SymmetricMemory:
    """One rank's view of the memory of all (`Symmetric`).

    Args:
        group: ranks on one node, each with a GPU of its own, or in tests two that take turns with one.
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
        self.calls = self.generation = 0
        self.sizes: tuple[int, ...] = ()
        self.regions: list[Sequence[Tensor]] = []  # of each rank
        self.engine = Engine()
        self.engines = torch.cuda.Stream(device, priority=-1)
        self.start, self.done = torch.cuda.Event(), torch.cuda.Event()
        self.leaving: list[Sequence[Tensor]] = []  # tensors that are being put
        self.waiting: Any = None
        self.known: dict[Any, tuple[Sequence[Step], list[Operation]]] = {}
        self.compute = torch.cuda.current_stream(device)
        self.error = torch.zeros(2, dtype=torch.int64).pin_memory()
        self.failed = self.error.numpy()  # the same memory, quicker to look at
        self.late, self.count = torch.zeros(2, 1, dtype=torch.int32, device=device)
        self.aside, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.latest: Recording | None = None  # a pool ends with the last graph that uses it, and cannot be used again
        self.all_words = self.map(4 * ROWS * WORDS)
        self.my_words = tuple(self.words(self.rank))
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
        return Mapped((mine, handle), [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(self.size)])

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
        if self.regions and all(size <= have for size, have in zip(sizes, held, strict=True)):
            return
        most = (max(size, have, 1) for size, have in zip(sizes, held, strict=True))  # nothing cannot be mapped
        self.sizes = tuple(-(-size // ALIGNMENT) * ALIGNMENT for size in most)
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
        self.known.clear()
        self.latest, self.pool = None, torch.cuda.graph_pool_handle()

    def region(self, rank: int, index: int) -> Tensor:
        """See `Symmetric.region`."""
        return self.regions[rank][index]

    def words(self, rank: int) -> Tensor:
        """See `Symmetric.words`."""
        return self.all_words.of_rank[rank].view(torch.int32).view(ROWS, WORDS)

    def begin(self, marks: Sequence[Mark] = ()) -> None:
        """See `Symmetric.begin`."""
        self.turn()
        self.write(marks, self.count)

    def mark(self, marks: Sequence[Mark]) -> None:
        """See `Symmetric.mark`."""
        self.write(marks)

    def write(self, marks: Sequence[Mark], *own: Tensor) -> None:
        """Writes words from the stream of the compute itself, which nobody has to wait for first."""
        name = id(marks), len(own)
        (operation,) = self.lowered(name, marks, lambda: [self.engine.mark(*own, *(x.words for x in marks))])
        operation((), self.calls, self.compute.cuda_stream)

    def turn(self) -> None:
        """Another call begins, on the current stream."""
        self.check()
        self.engine.enter()
        current = torch.cuda.current_stream(self.device)
        if current != self.compute:  # regions are used in turn in the order of calls, whatever their streams
            current.wait_stream(self.compute)
            self.compute = current
        self.calls += 1

    def record(self, work: Callable[[], object]) -> Recording:
        """What `work`, a call, starts; nothing is started. What it allocates is its own, and used at every start."""
        self.check()
        collecting = gc.isenabled()
        gc.disable()  # what would be destroyed now may belong to CUDA, which must not be asked for that meanwhile
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        kept = self.compute, self.calls
        self.compute, self.engine.recorded = self.aside, []
        try:
            with torch.cuda.stream(self.aside):
                graph.capture_begin(self.pool, "thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
            self.latest = Recording(self.engine.driver, graph, self.engine.recorded)
            return self.latest
        finally:
            (self.compute, self.calls), self.engine.recorded = kept, None
            if collecting:
                gc.enable()

    def replay(self, recording: Recording) -> None:
        """Starts a call that was recorded."""
        self.turn()
        recording.start(self.calls, self.compute.cuda_stream)

    def copy(self, puts: Sequence[Step], tensors: Sequence[Tensor] = ()) -> None:
        """See `Symmetric.copy`."""
        self.start.record(self.compute)
        self.engines.wait_event(self.start)
        self.leaving.append(tensors)
        bases, count, stream = [x.data_ptr() for x in tensors], self.calls, self.engines.cuda_stream
        name = id(puts), *(x.stride() for x in tensors)  # for tensors that lie alike
        for operation in self.lowered(name, puts, lambda: [self.operation(x, tensors) for x in puts]):
            operation(bases, count, stream)

    def operation(self, x: Step, tensors: Sequence[Tensor]) -> Operation:
        return self.engine.put(x, tensors) if isinstance(x, Put) else self.engine.mark(x.words)

    def lowered(self, name: Any, steps: Sequence[Step], lower: Callable[[], list[Operation]]) -> list[Operation]:
        """What steps mean to CUDA, kept with the steps, so that nothing else gets the id that is in their name."""
        known = self.known.get(name)
        if known is None:
            known = self.known[name] = steps, lower()
            if len(self.known) > KNOWN:
                del self.known[next(iter(self.known))]
        return known[1]

    def hear(self, row: int, poison: Tensor) -> None:
        """See `Symmetric.hear`."""
        nans = poison.numel() * poison.element_size() // 4
        arguments = self.my_words[row], self.error, self.late, poison, self.count, nans, self.patience, self.rank
        elsewhere = torch.cuda.current_device() != self.device.index
        with torch.cuda.device(self.device) if elsewhere else nullcontext():
            if self.waiting is None:
                from ringattn.transport.await_kernel import await_kernel

                launch: Any = await_kernel[(1,)]
                # What it compiled, which starts quicker.
                self.waiting = launch(*arguments, self.size, num_warps=1)[(1, 1, 1)]
            else:
                self.waiting(*arguments, self.size)

    def finish(self) -> None:
        """See `Symmetric.finish`."""
        self.done.record(self.engines)
        self.compute.wait_event(self.done)
        self.leaving.clear()

    def check(self) -> None:
        """Raises if a wait before now ran into the deadline.

        Raises:
            TransportError: says for whom.
        """
        missing = int(self.failed[0])
        if missing:
            peers = [rank for rank in range(self.size) if missing >> rank & 1]
            whom = "other ranks' copy engines" if missing == BY_A_KERNEL else f"ranks {peers}"
            raise TransportError(
                f"rank {self.rank} waited {self.deadline.total_seconds():g} s for {whom} in call {self.failed[1]}: a "
                "rank died, is late or made another call; what was computed since is NaN, and this group cannot be "
                "used any more"
            )
