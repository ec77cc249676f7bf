"""Batches: a function of (seed, step) alone; labels are the next byte, and none where another file begins."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from ringattn.launch import data as corpora
from ringattn.launch import settings
from ringattn.launch.data import END, IGNORED, Corpus

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def corpus(small: settings.Train) -> Corpus:
    return Corpus(small.data)


def test_labels_are_the_next_byte(corpus: Corpus):
    ids, labels, _ = corpus.batch(seed=0, step=3)
    assert ids.shape == labels.shape == (4, 50)
    after_end = ids == END
    assert after_end.any(), "no file ends in this batch; the test needs one that does"
    assert (labels[after_end] == IGNORED).all()
    inside = ~after_end[:, :-1]
    assert torch.equal(labels[:, :-1][inside], ids[:, 1:][inside])
    assert (labels[:, -1] != IGNORED).any(), "the last token has a label too: one more byte is read than fed"


def test_a_batch_depends_on_seed_step_and_split_only(corpus: Corpus, small: settings.Train):
    ids, labels, _ = corpus.batch(1, 2)
    again = Corpus(small.data).batch(1, 2)
    assert torch.equal(ids, again[0])
    assert torch.equal(labels, again[1])
    for other in (corpus.batch(2, 2), corpus.batch(1, 3), corpus.batch(1, 2, "validation")):
        assert not torch.equal(ids, other[0])


def test_rows_are_rows_of_the_whole_batch(corpus: Corpus):
    ids, labels, _ = corpus.batch(0, 1)
    parts = [corpus.batch(0, 1, rows=slice(2 * i, 2 * i + 2)) for i in range(2)]
    assert torch.equal(ids, torch.cat([part[0] for part in parts]))
    assert torch.equal(labels, torch.cat([part[1] for part in parts]))


def test_packed_documents(small: settings.Train):
    """Stretches of the text whose last token has no label; all rows of a step are cut alike, steps are not."""
    data = dataclasses.replace(small.data, document_mean=12, document_longest=30)
    corpus = Corpus(data)
    text = bytes(corpus._bytes["train"])
    lengths = set()
    for step in range(5):
        ids, labels, cu_seqlens = corpus.batch(seed=0, step=step)
        assert cu_seqlens is not None
        assert cu_seqlens[-1] == ids.shape[1] == 50
        lengths.add(tuple(cu_seqlens.tolist()))
        assert cu_seqlens.diff().max() <= 30
        for row in range(4):
            for start, end in itertools.pairwise(cu_seqlens.tolist()):
                document, expected = ids[row, start:end], ids[row, start + 1 : end]
                assert bytes(document.tolist()) in text
                assert labels[row, end - 1] == IGNORED
                assert torch.equal(labels[row, start : end - 1], expected.masked_fill(document[:-1] == END, IGNORED))
    assert len(lengths) == 5
    part = Corpus(data).batch(0, 1, rows=slice(2, 4))
    assert torch.equal(part.ids, corpus.batch(0, 1).ids[2:])


def test_files_are_whole_and_on_one_side(corpus: Corpus, text: Path):
    splits = {name: bytes(corpus._bytes[name]) for name in ("train", "validation")}
    for path in text.iterdir():
        content = path.read_bytes() + bytes([END])
        assert sum(content in split for split in splits.values()) == 1
    assert sum(corpus.sizes.values()) == sum(path.stat().st_size + 1 for path in text.iterdir())


def test_the_cache_follows_the_text(tmp_path: Path, small: settings.Train):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("some text " * 20)
    data = dataclasses.replace(small.data, folder=str(tmp_path))
    first = Corpus(data)
    assert Corpus(data).digest == first.digest
    (tmp_path / "0.txt").write_text("other text " * 20)
    assert Corpus(data).digest != first.digest


def test_whoever_prepares_first_wins(tmp_path: Path, small: settings.Train, monkeypatch: pytest.MonkeyPatch):
    """Two jobs come to an empty cache at once: the second finds the first's files in place when it is done."""
    data = dataclasses.replace(small.data, cache=str(tmp_path))
    writing = corpora.write

    def write_while_another_does(*arguments: Any) -> None:
        monkeypatch.setattr(corpora, "write", writing)
        Corpus(data)
        writing(*arguments)

    monkeypatch.setattr(corpora, "write", write_while_another_does)
    assert Corpus(data).sizes == Corpus(data).sizes
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"glob": "*.rs"}, r"no files match '\*\.rs'"),
        ({"exclude": ".txt"}, "no files match"),
        ({"seq_len": 10**6}, r"too few for data\.seq_len=1000000"),
    ],
)
def test_unusable_text_is_refused(small: settings.Train, change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Corpus(dataclasses.replace(small.data, **change))
