"""Activation checkpointing that never runs the ring twice: keep (out, lse), recompute everything else."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

__all__ = ["keep_attention"]


def save_attention(_context: Any, operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    if operator is torch.ops.ringattn.forward.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


keep_attention = partial(create_selective_checkpoint_contexts, save_attention)
"""For `torch.utils.checkpoint`: `checkpoint(block, x, use_reentrant=False, context_fn=ringattn.keep_attention)`."""
