"""torch's own flash attention kernels behind the interface of this package.

torch's kernels know two masks, none and a square causal one, so each segment is cut into pieces that they can take,
and the pieces merge in fp32:

    keys     0 . . offset . . k_len
    rows 0   [ full     ][ causal  ]
         .   [          ][         ]
         m   [ full               ]
             [ hindmost ][ full   ]    with a window only: a causal piece, turned by half a circle
    q_len    [          ][        ]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .interface import accumulate_dtype, nothing_seen, row_delta, settled
from .merge import merge_
from .segments import NO_WINDOW, Segment, Segments

__all__ = ["AtenKernel", "CudnnKernel", "native_pieces"]

aten = torch.ops.aten


class Piece(NamedTuple):
    """Rows and keys that are seen whole, or a square of which row i sees keys up to i ("causal") or from i on
    ("hindmost")."""

    rows: slice
    keys: slice
    seen: str

    def turned(self, x: Tensor, dim: int = 1) -> Tensor:
        """x, from last to first where that makes the piece causal."""
        return x.flip(dim) if self.seen == "hindmost" else x


def native_pieces(segments: Segments) -> Iterator[Piece]:
    """Cuts segments into pieces that torch's kernels can take.

    Example:
        >>> for rows, keys, seen in native_pieces(Segments([Segment(0, 4, 0, 3, 1)])):
        ...     print(f"rows {rows.start}:{rows.stop} keys {keys.start}:{keys.stop} {seen}")
        rows 0:2 keys 0:1 whole
        rows 0:2 keys 1:3 causal
        rows 2:4 keys 0:3 whole
    """
    for q_start, q_len, k_start, k_len, offset, window in narrow(segments):
        q_end, k_end = q_start + q_len, k_start + k_len
        corner = k_start + offset
        risen = q_start + k_len - offset if offset < k_len - 1 else q_start  # the first row to see the last key
        falling = q_end if window == NO_WINDOW else min(q_start + window - offset, q_end)  # no longer sees the first
        lost = k_start + 1 + q_end - falling
        for piece in (
            Piece(slice(q_start, risen), slice(k_start, corner), "whole"),
            Piece(slice(q_start, risen), slice(corner, k_end), "causal"),
            Piece(slice(risen, falling), slice(k_start, k_end), "whole"),
            Piece(slice(falling, q_end), slice(k_start + 1, lost), "hindmost"),
            Piece(slice(falling, q_end), slice(lost, k_end), "whole"),
        ):
            if all(span.start < span.stop for span in piece[:2]):
                yield piece


def narrow(segments: Segments) -> Iterator[Segment]:
    """The segments in canonical form, cut so that none has more keys than its window: no row misses keys at both
    ends."""
    for segment in segments:
        segment = segment.canonical()
        if segment is None:
            continue
        for k_start in range(0, segment.k_len, segment.window):
            part = segment._replace(
                k_start=segment.k_start + k_start,
                k_len=min(segment.window, segment.k_len - k_start),
                offset=segment.offset - k_start,
            ).canonical()
            if part is not None:
                yield part


class AtenKernel:
    """torch's FlashAttention-2 on CUDA devices, its flash attention for CPUs elsewhere."""

    name = "aten"
    reads_delta = False  # torch's backward derives delta from out and dout itself
    caps_scores = False
    row_delta = staticmethod(row_delta)
    settled = staticmethod(settled)

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
        for piece in native_pieces(segments):
            q_part, k_part, v_part = (piece.turned(x) for x in (q[:, piece.rows], k[:, piece.keys], v[:, piece.keys]))
            part, part_lse = self.attend(q_part, k_part, v_part, piece.seen != "whole", scale)
            merge_(out[:, piece.rows], lse[:, :, piece.rows], piece.turned(part), piece.turned(part_lse, 2))
        return out.to(out_dtype or out.dtype), lse

    def backward(self, dout, q, k, v, out, lse, delta, segments, *, scale, dq=None, dk=None, dv=None, out_dtype=None):
        dq, dk, dv = (
            torch.zeros_like(x, dtype=accumulate_dtype(x), memory_format=torch.contiguous_format) if dx is None else dx
            for x, dx in ((q, dq), (k, dk), (v, dv))
        )
        for piece in native_pieces(segments):
            dout_part, q_part, out_part = (piece.turned(x[:, piece.rows]) for x in (dout, q, out))
            k_part, v_part = (piece.turned(x[:, piece.keys]) for x in (k, v))
            lse_part = piece.turned(lse[:, :, piece.rows], 2).contiguous()
            parts = self.differentiate(
                dout_part, q_part, k_part, v_part, out_part, lse_part, piece.seen != "whole", scale
            )
            for total, part in zip((dq[:, piece.rows], dk[:, piece.keys], dv[:, piece.keys]), parts, strict=True):
                total.add_(piece.turned(part))
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
