"""Masks of the Hopper backward, as far as no GPU is needed: where they are applied, and what their assembly does."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest
import torch

from ringattn.kernels.segments import NO_WINDOW, Segment, Segments

pytest.importorskip("triton")

WORD = (1 << 32) - 1


def segments_of(draw: random.Random, rows: int, keys: int) -> Segments:
    """Two or three documents one after the other, in which a row sees about as many keys as a tile has, or more."""
    cuts = [sorted({0, n, *draw.sample(range(1, n), 2)}) for n in (rows, keys)]
    return Segments(
        Segment(q0, q1 - q0, k0, k1 - k0, draw.choice([0, 64, 128, draw.randint(-100, 400)]), window)
        for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(cut) for cut in cuts), strict=False)
        for window in [draw.choice([NO_WINDOW, NO_WINDOW, 128, 191, draw.randint(1, 500)])]
    )


@pytest.mark.parametrize("seed", range(60))
def test_a_step_has_a_mask_exactly_where_it_is_not_seen_whole(seed):
    from ringattn.kernels.hopper_backward_launch import BLOCK, KEYS, ROWS, lower, places
    from ringattn.kernels.hopper_walk import masked

    draw = random.Random(seed)
    rows, keys = draw.choice([256, 384, draw.randint(70, 700)]), draw.choice([256, 384, draw.randint(70, 700)])
    work, *_ = lower(segments_of(draw, rows, keys), keys)
    lines = places(rows, torch.device("cpu")).base
    for _, begin, end in work.tiles.tolist():
        for start, length, head, tail, shift, low, high, window in work.runs[begin:end].tolist():
            assert start + length <= rows
            t, u = torch.arange(-(-length // ROWS) * ROWS)[:, None], torch.arange(KEYS)[None, :]
            back = t + shift - u
            seen = (low <= u) & (u < high) & (t < length) & (back >= 0) & (back < window)
            for j in range(0, length, ROWS):
                masks = [bool(masked.fn(half, j, length, shift, low, high, window)) for half in (0, 1)]
                parts = seen[j : j + ROWS].split(KEYS // 2, 1)
                assert masks == [not part.all() for part in parts]
                if head <= j // BLOCK * BLOCK < tail:
                    assert not any(masks)
                words = lines[4 * (j // ROWS) + masks[0] + 2 * masks[1], :2]
                assert words.tolist() == [j if mask else -ROWS for mask in masks]


def test_keys_that_are_not_there_have_a_mask():
    """The last tile's keys are seen whole by most rows, but 56 of them are zeros behind the end."""
    from ringattn.kernels.hopper_backward_launch import lower
    from ringattn.kernels.hopper_walk import masked

    work, *_ = lower(Segments([Segment(0, 700, 0, 200, 200)]), 200)
    ((begin, end),) = ([begin, end] for key0, begin, end in work.tiles.tolist() if key0 == 128)
    ((_, length, head, tail, shift, low, high, window),) = work.runs[begin:end].tolist()
    assert head == tail
    for j in range(0, length, 64):
        assert masked.fn(1, j, length, shift, low, high, window)


def run(code: Any, values: dict[str, int], lane: int) -> dict[str, int]:
    """What a thread makes of its registers by the few PTX instructions that masks are made of."""
    values = values | {"%laneid": lane}

    def signed(x: int) -> int:
        return x - (1 << 32) if x >> 31 else x

    def spread(low: int, high: int, selector: int) -> int:
        bytes_ = (high << 32 | low).to_bytes(8, "little")
        nibbles = [selector >> 4 * i & 15 for i in range(4)]
        return int.from_bytes((bytes_[x & 7] if x < 8 else 255 * (bytes_[x & 7] >> 7) for x in nibbles), "little")

    operations = {
        "mov.u32": lambda x: x, "mov.b32": lambda x: x, "not.b32": lambda x: ~x, "and.b32": lambda x, y: x & y,
        "sub.s32": lambda x, y: x - y, "add.s32": lambda x, y: x + y, "prmt.b32": spread,
        "max.s32": lambda x, y: max(signed(x), signed(y)), "shl.b32": lambda x, y: x << min(y, 32),
        "setp.eq.s32": lambda x, y: x == y,
    }  # fmt: skip
    for line in re.split(r"[;{}]", code):
        parts = re.fullmatch(r"\s*(?:@(\w+) )?([\w.]*)\s*(.*?)\s*", line)
        assert parts is not None, line
        guard, name, rest = parts.groups()
        if not name or name.startswith(".reg") or (guard and not values[guard]):
            continue
        target, *operands = re.split(r",\s*", rest)
        numbers = [int(x[2:], 16) if x.startswith("0f") else values[x] if x in values else int(x) for x in operands]
        values[target] = operations[name](*(x & WORD for x in numbers)) & WORD
    return values


@pytest.mark.parametrize("seed", range(100))
def test_the_assembly_keeps_what_is_seen(seed):
    from ringattn.kernels.hopper_mask import hidden_asm, hidden_pairs_asm

    draw = random.Random(seed)
    lane, rows = draw.randrange(32), range(64)
    bounds = [(draw.randint(-90, 90), draw.choice([0, 64, draw.randint(-90, 150)])) for _ in (0, 1)]
    seen = [[begin <= row < end for row in rows] for begin, end in bounds]
    columns = [8 * k + lane % 4 * 2 for k in range(8)]

    n = 32
    register = {f"${i}": i for i in range(n)}
    inputs = {f"${(2 + which) * n + i}": bounds[i // 2 % 2][which] for which in (0, 1) for i in range(n)}
    values = run(hidden_asm(n), register | inputs, lane)
    order = [(key, column + odd) for column in columns for key in (0, 1) for odd in (0, 1)]
    assert [values[f"${i}"] for i in range(n)] == [i if seen[k][r] else 0xFF800000 for i, (k, r) in enumerate(order)]

    n = 16
    register = {f"${f * n + i}": 0 for f in (0, 1) for i in range(n)}
    register |= {f"${(2 + f) * n + i}": draw.getrandbits(32) for f in (0, 1) for i in range(n)}
    inputs = {f"${(4 + which) * n + i}": bounds[i % 2][which] for which in (0, 1) for i in range(n)}
    values = run(hidden_pairs_asm(n), register | inputs, lane)
    for i, (column, key) in enumerate((column, key) for column in columns for key in (0, 1)):
        mask = 0xFFFF * seen[key][column] + 0xFFFF0000 * seen[key][column + 1]
        for form in (0, 1):
            assert values[f"${form * n + i}"] == register[f"${(2 + form) * n + i}"] & mask
