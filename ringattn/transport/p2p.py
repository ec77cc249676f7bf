"""Messages over torch.distributed: NCCL between GPUs, gloo between CPUs.

On GPUs they have communicators of their own, so that they wait for nobody else's collectives, on streams of high
priority: a narrow one for messages beside a launch that leaves them room, since each channel takes a multiprocessor
away from it, and a wide one for all others.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ringattn.transport.interface import Message, Move, TransportError
from ringattn.transport.watch import Expected, Watch

__all__ = ["P2PTransport"]

NARROW, WIDE = 6, 16  # channels; at 8192 tokens of 8 heads six bring 33 MB in less time than own keys take
ALL_BITS = 0xFF  # NaN in every floating dtype


@contextmanager
def watchdog_off() -> Iterator[None]:
    """A communicator made meanwhile does not end the process when a peer dies; `Watch` raises instead."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class P2PTransport:
    """Batched messages in one process group."""

    def __init__(self, group: dist.ProcessGroup, deadline: timedelta):
        self.group = group
        self.rank = dist.get_rank(group)
        self.deadline = deadline
        self.narrow: Any = None  # a dist.ProcessGroupNCCL, which builds of torch for CPUs lack
        self.wide: Any = None
        self.processors = 0
        self.watch: Watch | None = None
        self.gathering = AllgatherOptions()
        self.gathering.asyncOp = True

    def connect(self, device: torch.device, narrow: bool) -> None:
        """Makes NCCL's communicators, once; the narrow one if it will be used. Collective."""
        if device.type != "cuda":
            return
        if self.watch is None:
            self.side = torch.cuda.Stream(device)
            self.watch = Watch(self.rank, self.deadline.total_seconds(), self.give_up)
        if self.wide is None:
            self.wide = self.communicator("wide", WIDE, device)
        if narrow and self.narrow is None:
            self.narrow = self.communicator("narrow", NARROW, device, scattered=True)
            self.processors = NARROW

    def communicator(self, name: str, channels: int, device: torch.device, *, scattered: bool = False) -> Any:
        """A new one, which all ranks have joined: in the first exchange of a sequence a rank with an empty shard has
        nothing to say.

        Each channel is a block of threads. NCCL has four of them start side by side or not at all, and the
        multiprocessors that a launch leaves free do not lie so: unless `scattered`, messages wait until it ends."""
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.max_ctas = channels
        if scattered:
            options.config.cga_cluster_size = 1
        options.global_ranks_in_group = dist.get_process_group_ranks(self.group)
        store = PrefixStore(f"ringattn/{self.group.group_name}/{name}", _get_default_store())
        with watchdog_off():
            made: Any = dist.ProcessGroupNCCL(store, self.rank, self.group.size(), options)
        atexit.register(made.abort)
        first = torch.zeros(1, dtype=torch.uint8, device=device).fill_(ALL_BITS)  # loads the kernel of `give_up`
        made.allreduce([first]).wait()
        return made

    def give_up(self, coming: Sequence[Tensor]) -> None:
        """Makes NaN of what has not come, so that nobody takes it for numbers, and lets the GPU go on."""
        with torch.cuda.stream(self.side):
            for tensor in coming:
                tensor.view(-1).view(torch.uint8).fill_(ALL_BITS)
        self.side.synchronize()
        # All at once: an abort frees memory, and so waits for kernels, those of the other communicator among them.
        aborts = [Thread(target=made.abort) for made in (self.narrow, self.wide) if made is not None]
        for abort in aborts:
            abort.start()
        for abort in aborts:
            abort.join()

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], *, narrow: bool = False
    ) -> Callable[[], None]:
        """See `Transport.exchange`."""
        sends, receives = ([m for m in messages if m.tensor.numel()] for messages in (sends, receives))
        if not sends and not receives:  # an empty shard is not announced: every rank knows every length
            return lambda: None
        what = f"sends to ranks {sorted({m.peer for m in sends})}, receives from {sorted({m.peer for m in receives})}"
        if self.watch is not None:
            self.watch.check()
            expected = self.watch.expect(what, [message.tensor for message in receives])
            nccl = self.narrow if narrow else self.wide
            nccl._start_coalescing()
            for message in sends:
                nccl.send([message.tensor], message.peer, 0)
            for message in receives:
                nccl.recv([message.tensor], message.peer, 0)
            return self.following([nccl._end_coalescing()], expected, (sends, receives))
        with self.blaming(what):
            ops = [
                dist.P2POp(operation, message.tensor, group=self.group, group_peer=message.peer)
                for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
                for message in messages
            ]
            return self.waiting(dist.batch_isend_irecv(ops), what, ops)

    def all_gather(self, moves: Sequence[Move]) -> Callable[[], None]:
        """See `Transport.all_gather`."""
        pairs = [(whole.view(-1), part.view(-1)) for whole, part in moves if whole.numel()]
        what = "all ranks to gather"
        if self.watch is not None:
            self.watch.check()
            expected = self.watch.expect(what, [whole for whole, _ in pairs])
            works = [self.wide._allgather_base(whole, part, self.gathering) for whole, part in pairs]
            return self.following(works, expected, pairs)
        with self.blaming(what):
            gather = dist.all_gather_into_tensor
            works = [gather(whole, part, self.group, async_op=True) for whole, part in pairs]
            return self.waiting(works, what, pairs)

    def following(self, works: Sequence[Any], expected: Expected, keeping: object) -> Callable[[], None]:
        """The call that has the stream wait for NCCL, and returns at once. It keeps what is under way."""

        def wait(_keeping: object = keeping) -> None:
            for work in works:
                work.wait()
            expected.follow()

        return wait

    def waiting(self, works: Sequence[dist.Work | None], what: str, keeping: object) -> Callable[[], None]:
        """The call that waits for gloo. It keeps what is under way."""

        def wait(_keeping: object = keeping) -> None:
            for work in works:
                assert work is not None
                with self.blaming(what):
                    work.wait(self.deadline)

        return wait

    @contextmanager
    def blaming(self, what: str) -> Iterator[None]:
        """Says for whom gloo waited."""
        try:
            yield
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.rank} was not done with {what} after at most {self.deadline.total_seconds():g} s: "
                f"a rank died, or made another call ({error})"
            ) from error
