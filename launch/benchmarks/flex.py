"""torch's context parallelism of flex_attention: the peer that takes any mask.

All keys are gathered. Blocks of 128 queries are dealt to ranks, the longest first and to and fro, which torch calls
"processing-time based round-robin"; a `BlockMask` says which blocks of keys they see. Source:
torch.distributed.tensor.experimental._attention and ._context_parallel (2.11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention import flex_attention as flex

from ringattn.kernels.tiles import query_tiles
from ringattn.layout import Layout, Run
from ringattn.mask import FAR, Mask
from ringattn.plan import make_plan

from ..oracle import Case, Inputs
from .across import Across

__all__ = ["TorchFlexParallel"]

BLOCK = 128  # queries, and keys, of a block
EXPERIMENTAL = "torch.distributed.tensor.experimental."


class Dealt(NamedTuple):
    """What torch asks a load balancer for."""

    order: Tensor  # [1, S]: the sequence as the ranks hold it, one after the other

    def _generate_indices(self, restore: bool = False) -> Tensor:
        return self.order.argsort(1) if restore else self.order


class Attend(nn.Module):
    """What users parallelise: a module whose forward is flex_attention."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
        return self.function(q, k, v, block_mask=block_mask, enable_gqa=True)


class TorchFlexParallel(Across):
    """torch.compile(flex_attention) in a module parallelised by `_ContextParallel`."""

    name = "torch-cp-flex"
    layout = "contiguous"  # before blocks are dealt
    kernel = "flex"
    heads_first = True
    any_mask = True

    def refuses(self, x: Inputs, case: Case, ranks: int) -> str | None:
        if not x.q.is_cuda:
            return "flex_attention has no backward on CPUs"
        if case.seq_len % (ranks * BLOCK):
            return f"{case.seq_len} tokens do not divide among {ranks} ranks in blocks of {BLOCK}"
        return None

    def arrange(self, case: Case, ranks: int) -> Layout:
        deal = import_module(EXPERIMENTAL + "_attention")._PTRRLoadBalancer.ptrr_scheduling
        segments = make_plan("contiguous", case.seq_len, 1, **case.mask).segments(0, 0)
        work = query_tiles(segments, case.seq_len, BLOCK, BLOCK)
        blocks = torch.empty(len(work.tiles), dtype=torch.int64)
        blocks[work.tiles[:, 0].long() // BLOCK] = torch.from_numpy(work.blocks(BLOCK))
        runs = (tuple(Run(BLOCK * block, BLOCK) for block in share) for share in deal(blocks, ranks).tolist())
        return Layout(self.name, case.seq_len, ranks, tuple(runs))

    @contextmanager
    def ready(self, case: Case, device: torch.device) -> Iterator[None]:
        ranks = dist.get_world_size()
        mesh = init_device_mesh(device.type, (ranks,))
        parallel = import_module(EXPERIMENTAL + "_attention")._ContextParallel
        style = parallel(seq_dim=2, attention_type=parallel.AttentionType.FLEX)
        self.module = parallelize_module(Attend(compiled()), mesh, style)
        layout = self.arrange(case, ranks)
        order = torch.cat([layout.positions(rank) for rank in range(ranks)])
        make = import_module(EXPERIMENTAL + "_context_parallel._attention")._create_cp_block_mask
        whole = 1, 1, case.seq_len, case.seq_len
        self.block_mask = make(predicate(case, device), *whole, mesh, Dealt(order[None].to(device)))
        yield
        del self.module, self.block_mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
        return self.module(q, k, v, block_mask=self.block_mask)


@cache
def compiled() -> Callable[..., Tensor]:
    """flex_attention as it is meant to be used, compiled once."""
    return torch.compile(flex.flex_attention, dynamic=False)


def predicate(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """A mask as flex_attention wants it: whether a query sees a key, by their places in the sequence."""
    mask = Mask(case.causal, (-1 if case.window is None else case.window - 1, -1))
    left, right = mask.left, mask.right
    token = torch.arange(case.seq_len)
    bounds = torch.tensor(case.documents or (0, case.seq_len))
    document = torch.searchsorted(bounds, token, right=True).to(device)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = document[q] == document[k]
        if right < FAR:
            seen = seen & (k <= q + right)
        return seen & (k >= q - left) if left < FAR else seen

    return sees
