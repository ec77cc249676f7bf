"""The one GPU kernel of a transport: waits until words in this rank's memory have counted up, but not for ever.

A word is written by another rank over NVLink. One program of one warp looks at them in turn. Past the deadline it
writes down for whom it waited, makes NaN of what should have come, and goes on: neither a dead peer nor a late one can
hang or kill the process, or have old numbers taken for new ones.
"""

# pyright: reportInvalidTypeForm=false

# Triton reads annotations and globals of kernels: no `from __future__ import annotations` here.
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

__all__ = ["await_kernel"]

CHUNK = tl.constexpr(1024)
NAN = tl.constexpr(-1)  # in every floating dtype, if all bits are set


@triton.jit(do_not_specialize=["nans", "patience", "me"])
def await_kernel(
    p_words, p_error, p_late, p_poison, p_count, nans: tl.int64, patience: tl.int64, me, RANKS: tl.constexpr
):  # fmt: skip
    """Words [RANKS] int32, late [1] and count [1] int32, in device memory, and so is poison, of so many `nans` of 4
    bytes; error [2] int64 in host memory: ranks not heard of (bits; -1 if it was late before), the count."""
    start = globaltimer()
    count = tl.load(p_count)
    late = tl.atomic_add(p_late, 0, sem="relaxed")
    missing = tl.cast(0, tl.int64)
    for peer in range(RANKS):
        if (peer != me) & (late == 0):
            waited = tl.cast(0, tl.int64)
            seen = tl.atomic_add(p_words + peer, 0, sem="acquire", scope="sys")
            while (seen < count) & (waited < patience):
                seen = tl.atomic_add(p_words + peer, 0, sem="acquire", scope="sys")
                waited = globaltimer() - start  # pyright: ignore[reportOperatorIssue]
            if seen < count:
                missing = missing | (tl.cast(1, tl.int64) << peer)
    if (missing != 0) | (late != 0):
        p_nan = p_poison.to(tl.pointer_type(tl.int32))
        for i in range(0, nans, CHUNK):
            place = i + tl.arange(0, CHUNK)
            tl.store(p_nan + place, NAN, mask=place < nans)
        if late == 0:
            tl.store(p_error + 1, count.to(tl.int64))
            tl.store(p_error, missing)
            tl.atomic_xchg(p_late, 1, sem="release")  # last: whoever sees it finds the error stored
        elif tl.load(p_error, volatile=True) == 0:  # another kernel found it late
            tl.store(p_error + 1, count.to(tl.int64))
            tl.store(p_error, NAN)
