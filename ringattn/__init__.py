"""Sequence-parallel attention: exact attention over a sequence that is cut across GPUs.

cp = ringattn.ContextParallel(mesh["cp"])       # or a ProcessGroup, or None
ids, labels = cp.shard(ids), cp.shard(labels)   # this rank's tokens
positions = cp.positions(seq_len)               # their global positions
out = cp.attention(q, k, v, causal=True)        # (batch, tokens, heads, head_dim)
"""

from ringattn.agreement import RankDisagreement
from ringattn.attention import ring_attention
from ringattn.context import ContextParallel
from ringattn.documents import Documents, cu_seqlens_from_positions, next_token_labels
from ringattn.layout import Layout, make_layout
from ringattn.mask import Mask
from ringattn.plan import Plan, make_plan
from ringattn.recompute import keep_attention
from ringattn.transport.interface import TransportError
from ringattn.version import __version__

__all__ = [
    "ContextParallel",
    "Documents",
    "Layout",
    "Mask",
    "Plan",
    "RankDisagreement",
    "TransportError",
    "__version__",
    "cu_seqlens_from_positions",
    "keep_attention",
    "make_layout",
    "make_plan",
    "next_token_labels",
    "ring_attention",
]
