"""Text as bytes: the files of a folder end to end, and batches that depend on (seed, step) alone.

    files -> train.bin, validation.bin   each file followed by one END byte; whole files go to one of the two
    (seed, step) -> offsets -> windows   the same global batch whatever the number of ranks
    (seed, step) -> lengths, offsets -> documents packed end to end, where data.document_mean asks for them

Nothing but the step has to be remembered to continue a run. The two files are made once per content, next to
each other in a cache, and memory-mapped by every rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringattn import next_token_labels
from ringattn.documents import IGNORED

from . import settings
from .packing import log_normal_lengths

__all__ = ["END", "IGNORED", "VOCABULARY", "Batch", "Corpus"]

VOCABULARY = 256
END = 0  # between files; does not occur in text. What follows is another file, which nothing could predict: IGNORED


class Batch(NamedTuple):
    """Inputs and labels of one step, [B, S] int64, and where its documents begin, if it is packed."""

    ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None = None


class Corpus:
    """A folder of text, split into train and validation.

    Attributes:
        digest (str): names the content; ranks and resumed runs must agree on it.
        sizes (dict[str, int]): bytes of each split.
    """

    def __init__(self, chosen: settings.Data) -> None:
        folder = Path(chosen.folder).expanduser() if chosen.folder else Path(sysconfig.get_paths()["stdlib"])
        home = Path(chosen.cache).expanduser() if chosen.cache else default_cache()
        self.folder = folder
        self.seq_len, self.rows = chosen.seq_len, chosen.batch
        self.packing = None
        if chosen.document_mean is not None:
            self.packing = chosen.document_mean, chosen.document_longest, chosen.document_spread
        built = prepare(find(folder, chosen), folder, chosen.validation_share, home)
        self.digest: str = json.loads((built / "content.json").read_text())["digest"]
        self._bytes = {name: np.memmap(built / f"{name}.bin", np.uint8, "r") for name in ("train", "validation")}
        self.sizes = {name: len(content) for name, content in self._bytes.items()}
        for name, size in self.sizes.items():
            if size <= self.seq_len:
                raise ValueError(
                    f"the {name} split of {folder} has {size} bytes, too few for data.seq_len={self.seq_len}: "
                    "give more text, a shorter seq_len or another data.validation_share"
                )

    def batch(self, seed: int, step: int, split: str = "train", rows: slice = slice(None)) -> Batch:
        """One step, or some of its rows.

        Labels are the inputs shifted by one, made here, before anything is cut across ranks: the label of a
        shard's last token may lie in another rank's shard.

        Example:
            A window `a b END c` of S = 3 gives inputs `a b END` and labels `b END IGNORED`.
        """
        draw = np.random.default_rng((seed, step))
        if self.packing is not None:
            return self.packed(draw, split, rows)
        starts = draw.integers(0, self.sizes[split] - self.seq_len, size=self.rows)[rows]
        content = self._bytes[split]
        windows = np.stack([content[start : start + self.seq_len + 1] for start in starts])
        tokens = torch.from_numpy(windows).long()
        ids, labels = tokens[:, :-1], tokens[:, 1:]
        return Batch(ids, labels.masked_fill(ids == END, IGNORED))

    def packed(self, draw: np.random.Generator, split: str, rows: slice) -> Batch:
        """Stretches of the text as documents, all rows of a step cut alike; a document's last token has no label."""
        assert self.packing is not None
        lengths = log_normal_lengths(draw, self.seq_len, *self.packing)
        content = self._bytes[split]
        starts = draw.integers(0, self.sizes[split] - lengths, size=(self.rows, len(lengths)))[rows]
        texts = [
            np.concatenate([content[start : start + length] for start, length in zip(row, lengths, strict=True)])
            for row in starts
        ]
        cu_seqlens = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))))
        ids = torch.from_numpy(np.stack(texts)).long()
        labels = next_token_labels(ids, cu_seqlens, IGNORED)
        return Batch(ids, labels.masked_fill(ids == END, IGNORED), cu_seqlens)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ringattn"


def find(folder: Path, chosen: settings.Data) -> list[Path]:
    """The files to read, in an order that does not depend on the machine."""
    files = sorted(path for path in folder.glob(chosen.glob) if path.is_file())
    kept = [path for path in files if not chosen.exclude or chosen.exclude not in path.relative_to(folder).as_posix()]
    if not kept:
        raise ValueError(f"no files match {chosen.glob!r} in {folder}; set data.folder and data.glob")
    return kept


def prepare(files: list[Path], folder: Path, share: float, home: Path) -> Path:
    """The folder that holds both splits of these files; made if it is not there yet.

    Ranks and jobs may come here at once: each works aside and renames, and the first one there wins.
    """
    key = hashlib.sha256(repr((str(folder), share)).encode())
    for path in files:
        status = path.stat()
        key.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    built = home / key.hexdigest()[:16]
    if built.is_dir():
        return built
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as name:
        aside = Path(name) / "splits"
        aside.mkdir()
        write(aside, files, folder, share)
        try:
            aside.rename(built)
        except OSError:
            if not built.is_dir():
                raise
    return built


def write(target: Path, files: Iterable[Path], folder: Path, share: float) -> None:
    """Both splits and the digest of what they hold."""
    digest = hashlib.sha256()
    with (target / "train.bin").open("wb") as train, (target / "validation.bin").open("wb") as validation:
        for path in files:
            name = path.relative_to(folder).as_posix().encode()
            # By name, so that a file stays on its side when others come or go.
            held_out = zlib.crc32(name) / 2**32 < share
            content = path.read_bytes() + bytes([END])
            (validation if held_out else train).write(content)
            digest.update(name + content)
    (target / "content.json").write_text(json.dumps({"digest": digest.hexdigest()[:16]}))
