"""Messages over torch.distributed: NCCL between GPUs, gloo between CPUs.

On GPUs they have a communicator of their own, so that they wait for nobody else's collectives: on a stream of high
priority, and on few channels, since each takes a multiprocessor away from attention while it is busy.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ringattn.transport.interface import Message, Move, TransportError
from ringattn.transport.watch import Watch

__all__ = ["P2PTransport"]

CHANNELS = int(os.environ.get("RINGATTN_CHANNELS", "16"))  # of NCCL


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
        self.nccl: Any = None  # a dist.ProcessGroupNCCL, which builds of torch for CPUs lack
        self.watch: Watch | None = None
        self.gathering = AllgatherOptions()
        self.gathering.asyncOp = True

    def connect(self, device: torch.device) -> None:
        """Makes NCCL's communicator, once. All ranks must join in that, and in the first exchange of a sequence a
        rank with an empty shard has nothing to say."""
        if device.type != "cuda" or self.nccl is not None:
            return
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.max_ctas = CHANNELS
        options.global_ranks_in_group = dist.get_process_group_ranks(self.group)
        store = PrefixStore(f"ringattn/{self.group.group_name}/nccl", _get_default_store())
        with watchdog_off():
            self.nccl = dist.ProcessGroupNCCL(store, self.rank, self.group.size(), options)
        atexit.register(self.nccl.abort)
        self.watch = Watch(self.rank, self.deadline.total_seconds(), self.nccl.abort)
        self.nccl.allreduce([torch.zeros(1, device=device)]).wait()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """See `Transport.exchange`."""
        sends, receives = ([m for m in messages if m.tensor.numel()] for messages in (sends, receives))
        if not sends and not receives:  # an empty shard is not announced: every rank knows every length
            return lambda: None
        what = f"sends to ranks {sorted({m.peer for m in sends})}, receives from {sorted({m.peer for m in receives})}"
        if self.watch is not None:
            self.watch.check()
            self.nccl._start_coalescing()
            for message in sends:
                self.nccl.send([message.tensor], message.peer, 0)
            for message in receives:
                self.nccl.recv([message.tensor], message.peer, 0)
            return self.waiting([self.nccl._end_coalescing()], what, (sends, receives))
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
            works = [self.nccl._allgather_base(whole, part, self.gathering) for whole, part in pairs]
            return self.waiting(works, what, pairs)
        with self.blaming(what):
            gather = dist.all_gather_into_tensor
            works = [gather(whole, part, self.group, async_op=True) for whole, part in pairs]
            return self.waiting(works, what, pairs)

    def waiting(self, works: Sequence[dist.Work | None], what: str, keeping: object) -> Callable[[], None]:
        """The call that waits: NCCL orders the stream and returns at once, gloo blocks. It keeps what is under way."""

        def wait(_keeping: object = keeping) -> None:
            for work in works:
                assert work is not None
                if self.watch is not None:
                    work.wait()
                else:
                    with self.blaming(what):
                        work.wait(self.deadline)
            if self.watch is not None:
                self.watch.follow(what)

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
