"""Every tile of every head is dealt to one program, and all programs have as much to do."""

from __future__ import annotations

import heapq
import random

import numpy as np
import pytest

from ringattn.kernels.dealing import BEGINNING, arranged, dealt_tiles, queue
from ringattn.kernels.segments import NO_WINDOW, Segment, Segments
from ringattn.kernels.tiles import key_tiles, query_tiles
from ringattn.plan import make_plan
from tests.kernels.test_kernels import cut

PROGRAMS, HEADS = 132, 32
DOCUMENTS = (0, 2067, 4633, 9630, 11886, 16384)


def loads(segments: Segments, rows: int, **changed) -> np.ndarray:
    """The blocks that each program walks."""
    options = {"heads": HEADS, "side": 16, "programs": PROGRAMS, "all": True, "together": 1} | changed
    dealt = dealt_tiles(segments, rows, 128 // options["together"], 128, **options)
    pieces, runs = dealt.pieces.numpy(), dealt.runs.numpy()
    blocks = -(-runs[:, 1] // 128)
    return np.array(
        [
            sum(
                blocks[begin:end].sum() + BEGINNING
                for _, _, begin, end in pieces[1 : 1 + pieces[0, program, 0], program]
            )
            for program in range(dealt.programs)
        ]
    )


@pytest.mark.parametrize("tokens", [8192, 32768])
@pytest.mark.parametrize("rank", [0, 1])
def test_shards_of_the_zigzag_layout_are_dealt_evenly(tokens, rank):
    segments = make_plan("zigzag", 2 * tokens, 2, causal=True).gathered_segments(rank)
    each = loads(segments, tokens)
    assert each.max() <= 1.002 * each.mean()


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("everything", [True, False])
def test_every_piece_once(everything, together):
    segments = Segments([Segment(300, 500, 0, 700, 200)])  # tiles before and after see nothing
    dealt = dealt_tiles(segments, 1000, 128, 128, 4, 2, 7, everything, together=together)
    work = query_tiles(segments, 1000, 128, 128)
    count, pieces = dealt.pieces.numpy()[0, :, 0], dealt.pieces.numpy()[1:]
    got = sorted(tuple(pieces[i, p].tolist()) for p in range(7) for i in range(count[p]))
    tiles = work.tiles.numpy() if everything else work.tiles.numpy()[: work.busy]
    assert got == sorted((head, *tile.tolist()) for head in range(0, 4, together) for tile in tiles)


@pytest.mark.parametrize("together", [1, 2])
def test_tiles_that_need_what_is_there_come_first(together):
    """The same tiles for each program; in each section those that see no key behind `near` before the others."""
    segments, side = make_plan("zigzag", 16384, 2, causal=True).gathered_segments(0), 8
    options = segments, 8192, 128, 128, HEADS, side, PROGRAMS, True
    plain, dealt = (dealt_tiles(*options, near, together) for near in (NO_WINDOW, 8192))
    assert sorted(map(tuple, dealt.pieces[1:, 5].tolist())) == sorted(map(tuple, plain.pieces[1:, 5].tolist()))
    starts = dealt.runs[:, 0].numpy()
    for program in range(PROGRAMS):
        hand = dealt.pieces[1 : 1 + dealt.pieces[0, program, 0], program].tolist()
        order = [(head // side, bool((starts[begin:end] >= 8192).any())) for head, _, begin, end in hand]
        assert order == sorted(order)


def test_nothing_to_see_and_nothing_to_write():
    assert dealt_tiles(Segments(), 1000, 128, 128, 4, 2, 7, all=False).programs == 0
    assert dealt_tiles(Segments(), 0, 128, 128, 4, 2, 7, all=True).programs == 0


def documents(rank: int) -> Segments:
    """Long documents among short ones, as one of two ranks sees them."""
    plan = make_plan("balanced", 16384, 2, causal=True, cu_seqlens=DOCUMENTS)
    return plan.gathered_segments(rank)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_packed_documents_are_dealt_evenly(rank, together):
    each = loads(documents(rank), 8192, together=together)
    assert each.max() <= 1.02 * each.mean()


@pytest.mark.parametrize("seed", range(40))
def test_every_piece_queues_once(seed):
    draw = random.Random(seed)
    rows, keys, block, step = draw.randint(1, 60), draw.randint(1, 60), draw.choice([4, 16]), draw.choice([4, 16])
    work, heads = key_tiles(cut(rows, keys, draw), keys, block, step), draw.choice([1, 4, 6])
    side = draw.choice([n for n in range(1, heads + 1) if heads % n == 0])
    far = draw.choice([NO_WINDOW, keys // 2 // block * block, 0])
    queued = queue(work, step, len(work.tiles), heads, side, 3, far=far)
    tiles = work.tiles[queued.tiles].tolist()
    assert sorted(tiles) == sorted(work.tiles.tolist())
    assert len(queued.pieces) == heads * len(tiles)
    for head in range(heads):  # in the order of the tiles, in which they may wait for each other (turns.py)
        assert [tile for each, *tile in queued.pieces.tolist() if each == head] == tiles
    assert len(queue(work, step, 0, heads, side, 3).pieces) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_what_starts_last_is_short(rank):
    work = key_tiles(documents(rank), 16384, 128, 128)
    work = work._replace(tiles=work.tiles[: work.busy])
    pieces = queue(work, 128, work.busy, 8, 2, PROGRAMS).pieces.numpy()
    length = dict(zip(work.tiles[:, 0].tolist(), (work.blocks(128) + BEGINNING).tolist(), strict=True))
    done = [0.0] * PROGRAMS
    for _, first, _, _ in pieces.tolist():
        heapq.heapreplace(done, done[0] + length[first])
    assert max(done) < 1.06 * np.mean(done)
    assert len(set(pieces[:32, 0].tolist())) <= 4  # and meanwhile few heads share the cache


def heads_in_turn(order: np.ndarray, pieces: int) -> list[set[int]]:
    """Which heads come in each so many pieces of an order."""
    return [set(order[1, begin : begin + pieces].tolist()) for begin in range(0, order.shape[1], pieces)]


def test_orders_use_the_cache_less_and_less():
    """Sections of two heads, of four, and both with the short pieces of all eight at the end."""
    length = np.array([9.0, 5, 3, 1])
    narrow, wide = arranged(length, 8, 2), arranged(length, 8, 4)
    assert heads_in_turn(narrow, 8) == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
    assert heads_in_turn(wide, 16) == [{0, 1, 2, 3}, {4, 5, 6, 7}]
    for side in (2, 4):
        order = arranged(length, 8, side, 4)
        long = order[:, order[0] < 3]
        assert order[0].tolist() == [*long[0], *[3] * 8]
        assert heads_in_turn(long, 3 * side) == heads_in_turn((narrow, wide)[side // 4], 4 * side)


def test_what_walks_alike_comes_first_unless_the_end_is_later():
    """Far keys after own ones that are as long, and after a long one, before which they would hold up the end."""
    for long, first in ((4, 4), (16, 0)):
        work = query_tiles(Segments([Segment(0, 4, 0, long, 1 << 20), Segment(4, 12, 0, 4, 1 << 20)]), 16, 4, 4)
        assert queue(work, 4, 4, 1, 1, 2, far=4).pieces[0, 1] == first


def test_sections_stay_narrow_unless_that_takes_longer():
    """A causal mask over many tiles; and few of which half are long, where four heads side by side are over sooner."""
    many = query_tiles(Segments([Segment(0, 8192, 0, 8192, 0)]), 8192, 128, 128)
    assert set(queue(many, 128, 64, 8, 2, PROGRAMS).pieces[:128, 0].tolist()) == {0, 1}
    few = query_tiles(Segments([Segment(0, 1024, 0, 8192, 1 << 20), Segment(1024, 1024, 0, 128, 0)]), 2048, 128, 128)
    assert set(queue(few, 128, 16, 8, 2, 32).pieces[:64, 0].tolist()) == {0, 1, 2, 3}
