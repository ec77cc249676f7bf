"""The ranks that share a sequence: a process group with what ringattn keeps for it between calls."""

from __future__ import annotations

import atexit
import os
from collections.abc import Hashable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore[reportPrivateImportUsage]

from ringattn.executors.call import Buffers, Call, Executor
from ringattn.transport.p2p import P2PTransport
from ringattn.transport.symmetric import SymmetricMemory

__all__ = ["ALONE", "Ranks", "group_name", "ranks_named"]

ALONE = ""  # the name of the group of a process that shares its sequence with nobody
DEADLINE = timedelta(seconds=float(os.environ.get("RINGATTN_DEADLINE", "300")))  # longest wait for another rank


class Ranks:
    """This process's view of one group. State that must be equal on all ranks changes only in collective calls."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.deadline = DEADLINE
        self.transport = P2PTransport(group, DEADLINE) if group is not None else None
        self.buffers = Buffers()
        self.symmetric: SymmetricMemory | None = None
        self.calls = 0  # attention calls so far, the same number on every rank
        self.agreed: dict[Hashable, tuple[Executor, Call]] = {}  # configuration -> what runs it
        self.same_node = False  # whether ranks reach each other's memory
        self.memory = 0  # bytes of the smallest GPU

    def connect(self, device: torch.device, executor: str) -> None:
        """Makes what an executor needs of the transports, once. Collective."""
        if self.group is None:
            return
        if executor == "pull":
            self.symmetric = self.symmetric or SymmetricMemory(self.group, device, self.deadline)
        else:
            assert self.transport is not None
            self.transport.connect(device, narrow=executor == "ring")


_ranks: dict[str, Ranks] = {ALONE: Ranks(None)}
atexit.register(_ranks.clear)  # threads of a process group that outlives the interpreter end the process by abort


def group_name(group: dist.ProcessGroup | DeviceMesh | None) -> str:
    """The name under which an operator finds a group again; operators take names, not process groups.

    Args:
        group: None means all ranks, or this process alone where torch.distributed is not initialised.

    Raises:
        ValueError: a mesh of several dimensions.
        TypeError: anything else.
    """
    if group is None:
        group = dist.group.WORLD if dist.is_initialized() else None
        if group is None:
            return ALONE
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or tuple(range(group.ndim))
            raise ValueError(f"got a mesh of dimensions {names}; pass one that shares a sequence: mesh[{names[-1]!r}]")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"got group of type {type(group).__name__}; pass a ProcessGroup, a 1-D DeviceMesh or None")
    return group.group_name


def ranks_named(name: str) -> Ranks:
    """The ranks of a group by its name. A group that was destroyed and made again is another one."""
    if name != ALONE:
        group = _resolve_process_group(name)  # pyright: ignore[reportArgumentType]
        if name not in _ranks or _ranks[name].group is not group:
            _ranks[name] = Ranks(group)
    return _ranks[name]
