"""torch's own flash attention kernels behind the interface of this package.

torch's kernels know two masks, none and a square causal one, so each segment is cut into at most three pieces
that they can take, and the pieces merge in fp32:

    keys     0 . . offset . . k_len
    rows 0   [ full     ][ causal  ]
         .   [          ][         ]
         m   [ full               ]
    q_len    [                    ]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .interface import accumulate_dtype, nothing_seen, row_delta
from .merge import merge_
from .segments import Segments

__all__ = ["AtenKernel", "CudnnKernel", "native_pieces"]

aten = torch.ops.aten


def native_pieces(segments: Segments) -> Iterator[tuple[slice, slice, bool]]:
    """Cuts segments into (rows, keys, causal) that are square and causal, or seen whole.

    Example:
        >>> for rows, keys, causal in native_pieces(Segments([Segment(0, 4, 0, 3, 1)])):
        ...     print(f"rows {rows.start}:{rows.stop} keys {keys.start}:{keys.stop} causal={causal}")
        rows 0:2 keys 0:1 causal=False
        rows 0:2 keys 1:3 causal=True
        rows 2:4 keys 0:3 causal=False
    """
    for segment in segments:
        segment = segment.canonical()
        if segment is None:
            continue
        q0, q1 = segment.q_start, segment.q_start + segment.q_len
        k0, k1 = segment.k_start, segment.k_start + segment.k_len
        if segment.unmasked:
            yield slice(q0, q1), slice(k0, k1), False
            continue
        corner = k0 + segment.offset
        end = q0 + k1 - corner  # the first row that sees every key
        if segment.offset:
            yield slice(q0, end), slice(k0, corner), False
        yield slice(q0, end), slice(corner, k1), True
        if end < q1:
            yield slice(end, q1), slice(k0, k1), False


class AtenKernel:
    """torch's FlashAttention-2 on CUDA devices, its flash attention for CPUs elsewhere."""

    name = "aten"
    reads_delta = False  # torch's backward derives delta from out and dout itself
    row_delta = staticmethod(row_delta)

    def refuses(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if q.shape[-1] != v.shape[-1]:
            return f"head dims differ: {q.shape[-1]} for q and k, {v.shape[-1]} for v"
        if q.device.type == "cpu":
            return None
        if q.device.type != "cuda":
            return f"no kernel for {q.device.type}"
        if q.dtype not in (torch.float16, torch.bfloat16):
            return f"on CUDA it takes float16 and bfloat16, not {q.dtype}"
        if q.shape[-1] > 256 or q.shape[-1] % 8:
            return f"on CUDA head dim must be a multiple of 8 up to 256, got {q.shape[-1]}"
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """out [B, L, H, D] in the dtype of q and lse [B, H, L] of one piece."""
        if q.device.type == "cuda":
            out, lse, *_ = aten._flash_attention_forward(
                q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
            )
            return out, lse
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse

    def differentiate(self, dout, q, k, v, out, lse, causal, scale) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv of one piece, in the dtype of q, given the final out and lse."""
        if q.device.type == "cuda":
            seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # read with dropout only
            return aten._flash_attention_backward(
                dout, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, causal, seed, seed[:0], scale=scale
            )
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def forward(self, q, k, v, segments, *, scale, running=None, out_dtype=None) -> tuple[Tensor, Tensor]:
        out, lse = running or nothing_seen(q, v)
        for rows, keys, causal in native_pieces(segments):
            part = self.attend(q[:, rows], k[:, keys], v[:, keys], causal, scale)
            merge_(out[:, rows], lse[:, :, rows], *part)
        return out.to(out_dtype or out.dtype), lse

    def backward(self, dout, q, k, v, out, lse, delta, segments, *, scale, dq=None, dk=None, dv=None):
        dq, dk, dv = (
            torch.zeros_like(x, dtype=accumulate_dtype(x), memory_format=torch.contiguous_format) if dx is None else dx
            for x, dx in ((q, dq), (k, dk), (v, dv))
        )
        for rows, keys, causal in native_pieces(segments):
            parts = self.differentiate(
                dout[:, rows], q[:, rows], k[:, keys], v[:, keys],
                out[:, rows], lse[:, :, rows].contiguous(), causal, scale,
            )  # fmt: skip
            for total, part in zip((dq[:, rows], dk[:, keys], dv[:, keys]), parts, strict=True):
                total.add_(part)
        return dq, dk, dv


class CudnnKernel(AtenKernel):
    """cuDNN's fused attention through torch, on CUDA devices; FlashAttention-2 for the single rows and keys that it
    does not take."""

    name = "cudnn"

    def refuses(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if q.device.type != "cuda":
            return f"cuDNN runs on CUDA devices, not on {q.device.type}"
        if q.shape[-1] > 128:
            return f"head dim must be a multiple of 8 up to 128, got {q.shape[-1]}"
        return super().refuses(q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        if 1 in (q.shape[1], k.shape[1]):
            return super().attend(q, k, v, causal, scale)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out.transpose(1, 2), lse.reshape(lse.shape[:3])

    def differentiate(self, dout, q, k, v, out, lse, causal, scale) -> tuple[Tensor, Tensor, Tensor]:
        if 1 in (q.shape[1], k.shape[1]):
            return super().differentiate(dout, q, k, v, out, lse, causal, scale)
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        seed = torch.empty((), dtype=torch.int64, device=q.device)  # read with dropout only
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.unsqueeze(-1), seed, seed, None, None, None,
            q.shape[2], k.shape[2], 0.0, causal, scale=scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
