"""The algebra of partial attention: pairs (out, lse) merge into what one pass over all keys would have given.

    lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

The operation is associative and commutative with (0, -inf) as its neutral element, which a form without a
guard turns into NaN: a row that has seen no key on either side has lse = -inf, and -inf - -inf is not a number.
Source: online softmax, arXiv:1805.02867; its use across blocks, arXiv:2205.14135, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_"]


def merge_(out: Tensor, lse: Tensor, out_part: Tensor, lse_part: Tensor) -> None:
    """Merges (out_part, lse_part) into (out, lse), in place.

    Args:
        out, out_part (Tensor): [B, L, H, E]; out in fp32 or fp64.
        lse, lse_part (Tensor): [B, H, L], natural log, -inf for a row that has seen nothing.

    Example:
        >>> out, lse = torch.tensor([[[[1.0]]]]), torch.tensor([[[0.0]]])
        >>> merge_(out, lse, torch.tensor([[[[4.0]]]]), torch.log(torch.tensor([[[2.0]]])))
        >>> round(out.item(), 5), round(lse.exp().item(), 5)  # weights 1/3 and 2/3
        (3.0, 3.0)
    """
    merged = torch.logaddexp(lse, lse_part)
    anchor = merged.masked_fill(merged == -torch.inf, 0.0)
    weight, weight_part = ((x - anchor).exp().transpose(1, 2).unsqueeze(-1) for x in (lse, lse_part))
    out.mul_(weight).add_(out_part * weight_part)
    lse.copy_(merged)
