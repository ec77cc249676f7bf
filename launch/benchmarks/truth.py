"""Whether a result is right at full length: one key/value head of it, against fp64.

Of the whole matrix only some rows are held at a time, so this works at any length:

    per rows I:   S = scale Q_I K^T    P = softmax S    O_I = P V    dP = dO_I V^T    dS = P (dP - rowsum(dO_I O_I))
                  dQ_I = scale dS K    dK += scale dS^T Q_I          dV += P^T dO_I

The same in fp32, with everything rounded that a kernel must round to the inputs' dtype (P and dS as factors of a
product, out and the gradients in the end), says how much error is no fault: a kernel may err twice as much in out,
and three times as much in gradients.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import torch
from torch import Tensor

from ..oracle import Case, Inputs, Result, allowed_error, error

__all__ = ["Truth", "one_head"]

MATRIX_BYTES = 2**30  # of one matrix of some rows; about ten such are alive at once
FACTORS = (2.0, 3.0, 3.0, 3.0)  # out, dq, dk, dv


def one_head(x: Inputs | Result, batch: int, group: int, groups: int) -> list[Tensor]:
    """One key/value head and the query heads that share it, [H/G, L, D] or [1, L, D] each."""
    parts = []
    for tensor in x:
        width = tensor.shape[2] // groups
        parts.append(tensor[batch, :, group * width : (group + 1) * width].transpose(0, 1))
    return parts


def attend(
    x: list[Tensor], case: Case, scale: float, dtype: torch.dtype, rounded: Callable[[Tensor], Tensor]
) -> Result:
    """Forward and backward of one key/value head, computed in `dtype`; [H/G, L, D] or [1, L, D] each."""
    q, k, v, dout = (tensor.to(dtype) for tensor in x)
    heads, length, _ = q.shape
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    outs, dqs = [], []
    step = max(1, min(length, MATRIX_BYTES // (heads * length * dtype.itemsize)))
    for start in reversed(range(0, length, step)):  # longest rows first: the others fit into their memory
        rows = slice(start, min(start + step, length))
        keys = within_reach(case, rows)
        p = q[:, rows] @ k[:, keys].mT * scale
        p = p.masked_fill_(hidden(case, rows, keys, q.device), -torch.inf).softmax(-1)
        out = rounded(rounded(p) @ v[:, keys])
        ds = dout[:, rows] @ v[:, keys].mT
        ds = rounded(ds.sub_((dout[:, rows] * out).sum(-1, keepdim=True)).mul_(p))
        outs.insert(0, out)
        dqs.insert(0, ds @ k[:, keys] * scale)
        dk[:, keys] += (ds.mT @ q[:, rows] * scale).sum(0, keepdim=True)
        dv[:, keys] += (rounded(p).mT @ dout[:, rows]).sum(0, keepdim=True)
    return Result(*(rounded(part) for part in (torch.cat(outs, 1), torch.cat(dqs, 1), dk, dv)))


def within_reach(case: Case, rows: slice) -> slice:
    """The keys that any of some rows sees, and as few others as one stretch allows."""
    first = 0 if case.window is None else max(rows.start - case.window + 1, 0)
    if case.documents is not None:
        first = max(first, case.documents[bisect_right(case.documents, rows.start) - 1])
    return slice(first, rows.stop if case.causal else case.seq_len)


def hidden(case: Case, rows: slice, keys: slice, device: torch.device) -> Tensor:
    """Which of some keys each of some rows does not see, [rows, keys] or less where all rows are alike."""
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)
    unseen = key > row if case.causal else torch.zeros((), dtype=torch.bool, device=device)
    if case.window is not None:
        unseen = unseen | (key <= row - case.window)
    if case.documents is not None:
        bounds = torch.tensor(case.documents, device=device)
        unseen = unseen | (torch.bucketize(key, bounds, right=True) != torch.bucketize(row, bounds, right=True))
    return unseen


class Truth:
    """What one key/value head of a case must be, and how far from it a result may be."""

    def __init__(self, case: Case, inputs: Inputs, batch: int, group: int):
        self.batch, self.group = batch, group
        x = one_head(inputs, batch, group, case.kv_heads)
        scale = case.head_dim**-0.5
        self.right = attend(x, case, scale, torch.float64, lambda part: part)
        wide = torch.promote_types(case.dtype, torch.float32)
        rough = attend(x, case, scale, wide, lambda part: part.to(case.dtype).to(wide))
        self.rough = Result(*(part.to(case.dtype) for part in rough))

    def faults(self, got: list[Tensor], tokens: Tensor | None = None) -> dict[str, tuple[float, float]]:
        """(error, allowed) of the parts that err too much or hold a NaN.

        Args:
            got: that head of a result, [H/G, L, D] or [1, L, D] each.
            tokens: the positions that `got` holds; all of them unless told.
        """
        found = {}
        for name, part, *expected, factor in zip(Result._fields, got, self.right, self.rough, FACTORS, strict=True):
            right, rough = expected if tokens is None else (each[:, tokens] for each in expected)
            measured = error(part.to(right.device), right, floor=0.0)
            allowed = allowed_error(rough, right, factor, floor=0.0)
            if not measured <= allowed:
                found[name] = measured, allowed
        return found
