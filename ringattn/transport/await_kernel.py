"""The one GPU kernel of a transport: waits until words in this rank's memory have counted up, but not for ever.

A word is written by another rank over NVLink. One program of one warp looks at them in turn; past the deadline it
writes down for whom it waited and goes on, so that neither a dead peer nor a late one can hang or kill the process.
"""

# Triton reads annotations and globals of kernels: no `from __future__ import annotations` here.
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

__all__ = ["await_kernel"]


@triton.jit(do_not_specialize=["count", "patience", "me"])
def await_kernel(p_words, p_error, count, patience, me, RANKS: tl.constexpr):
    """Words [RANKS] int32 in device memory; error [2] int64 in host memory: ranks not heard of (bits), the count."""
    start = globaltimer()
    missing = tl.cast(0, tl.int64)
    for peer in range(RANKS):
        if peer != me:
            waited = tl.cast(0, tl.int64)
            seen = tl.atomic_add(p_words + peer, 0, sem="acquire", scope="sys")
            while (seen < count) & (waited < patience):
                seen = tl.atomic_add(p_words + peer, 0, sem="acquire", scope="sys")
                waited = globaltimer() - start  # pyright: ignore[reportOperatorIssue]
            if seen < count:
                missing = missing | (tl.cast(1, tl.int64) << peer)
    if missing != 0:
        tl.store(p_error + 1, count.to(tl.int64))
        tl.store(p_error, missing)
