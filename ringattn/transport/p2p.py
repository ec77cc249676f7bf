"""Point-to-point messages over torch.distributed: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ringattn.transport.interface import Message, TransportError

__all__ = ["P2PTransport"]


class P2PTransport:
    """Batched isend/irecv in one process group."""

    def __init__(self, group: dist.ProcessGroup, deadline: timedelta):
        self.group = group
        self.rank = dist.get_rank(group)
        self.deadline = deadline
        self.connected = False

    def connect(self, device: torch.device) -> None:
        """Makes NCCL's communicator, once. All ranks must join in that, and in the first exchange of a sequence a
        rank with an empty shard has nothing to say."""
        if device.type == "cuda" and not self.connected:
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
        self.connected = True

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], None]:
        """See `Transport.exchange`."""
        ops = [
            dist.P2POp(operation, message.tensor, group=self.group, group_peer=message.peer)
            for operation, messages in ((dist.isend, sends), (dist.irecv, receives))
            for message in messages
            if message.tensor.numel()  # an empty shard is not announced: every rank knows every length
        ]
        works = dist.batch_isend_irecv(ops) if ops else []

        def wait() -> None:
            for work in works:
                self.finish(work, sends, receives)

        return wait

    def finish(self, work: dist.Work, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """NCCL orders the stream and returns at once, its own watchdog keeps the time; gloo blocks here."""
        if all(message.tensor.is_cuda for message in (*sends, *receives)):
            work.wait()
            return
        try:
            work.wait(self.deadline)
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.rank} was still sending to {sorted({m.peer for m in sends})} and receiving from "
                f"{sorted({m.peer for m in receives})} after at most {self.deadline.total_seconds():g} s: "
                f"a rank died, or made another call ({error})"
            ) from error
