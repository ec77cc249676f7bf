"""Training on several ranks is training on one: same losses, same weights, whatever the grid and the layout."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from ringattn.launch import metrics, settings
from ringattn.launch.data import IGNORED
from ringattn.launch.gang import Place
from ringattn.launch.trainer import Trainer
from tests.gang import run_ranks

pytestmark = pytest.mark.timeout(90)


def trained(rank: int, chosen: settings.Train, folder: Path, ranks: int) -> dict[str, np.ndarray]:
    """The final weights of a run, of which this is one rank."""
    trainer = Trainer(chosen, folder, Place(rank, ranks, torch.device("cpu"), "a test"))
    trainer.run()
    return {name: weight.numpy() for name, weight in trainer.model.state_dict().items()}


def losses(folder: Path) -> dict[int, float]:
    return {step: record["loss"] for step, record in metrics.read(folder).items()}


@pytest.fixture
def alone(small: settings.Train, tmp_path: Path) -> tuple[dict[str, np.ndarray], dict[int, dict]]:
    """The run on one rank, without torch.distributed."""
    weights = trained(0, small, tmp_path / "alone", 1)
    return weights, metrics.read(tmp_path / "alone")


def test_one_rank_learns_and_repeats_itself(alone, small: settings.Train, tmp_path: Path):
    weights, records = alone
    assert records[1]["loss"] == pytest.approx(5.545, abs=0.1)  # ln 256: it begins by knowing nothing
    assert records[6]["loss"] < records[1]["loss"] - 1
    assert [step for step in records if "validation_loss" in records[step]] == [3, 6]
    again = trained(0, small, tmp_path / "again", 1)
    assert all(np.array_equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize(
    ("ranks", "context", "layout"),
    [(2, 2, "zigzag"), (3, 3, "contiguous"), (4, 2, "striped"), (2, 1, "zigzag")],
)
def test_several_ranks_equal_one(alone, small: settings.Train, tmp_path: Path, ranks: int, context: int, layout: str):
    weights, records = alone
    parallel = dataclasses.replace(small.parallel, context=context, layout=layout)
    chosen = dataclasses.replace(small, parallel=parallel)
    per_rank = run_ranks(ranks, trained, chosen, tmp_path, ranks)
    for step, record in metrics.read(tmp_path).items():
        for name in ("loss", "grad_norm", "validation_loss"):
            if name in record:
                assert record[name] == pytest.approx(records[step][name], abs=2e-5), f"{name} of step {step}"
    for name, weight in per_rank[0].items():
        np.testing.assert_allclose(weight, weights[name], rtol=0, atol=1e-3)
        assert all(np.array_equal(weight, other[name]) for other in per_rank[1:]), f"ranks drifted apart in {name}"


def test_packed_documents_train_alike_on_1_2_and_4_ranks(small: settings.Train, tmp_path: Path):
    data = dataclasses.replace(small.data, seq_len=1100, document_mean=150)  # several chunks for each of two ranks
    small = dataclasses.replace(small, data=data, steps=3)
    runs = {}
    for ranks, layout in ((1, "balanced"), (2, "balanced"), (4, "balanced"), (4, "zigzag")):
        parallel = dataclasses.replace(small.parallel, layout=layout)
        folder = tmp_path / f"{ranks}-{layout}"
        run_ranks(ranks, trained, dataclasses.replace(small, parallel=parallel), folder, ranks)
        runs[folder.name] = losses(folder)
    for name, run in runs.items():
        assert run == pytest.approx(runs["1-balanced"], abs=2e-5), name
    assert runs["1-balanced"][3] < runs["1-balanced"][1]


def test_a_packed_document_is_as_if_it_were_alone(small: settings.Train, tmp_path: Path):
    data = dataclasses.replace(small.data, seq_len=300, document_mean=40)
    trainer = Trainer(dataclasses.replace(small, data=data), tmp_path, Place(0, 1, torch.device("cpu"), "a test"))
    part = trainer.part(1, "train")
    assert part.cu_seqlens is not None
    total, labelled = 0.0, 0
    for start, end in itertools.pairwise(part.cu_seqlens.tolist()):
        logits = trainer.model(part.ids[:, start:end], trainer.cp, end - start)
        labels = part.labels[:, start:end]
        total += functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum").item()
        labelled += int((labels != IGNORED).sum())
    assert trainer.loss(part).item() == pytest.approx(total / labelled, abs=1e-6)


def test_ranks_without_tokens_take_part(small: settings.Train, tmp_path: Path):
    chosen = dataclasses.replace(small, data=dataclasses.replace(small.data, seq_len=3), steps=2)
    trained(0, chosen, tmp_path / "alone", 1)
    run_ranks(4, trained, chosen, tmp_path / "four", 4)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "alone"), abs=2e-5)


def test_bf16_is_near_fp32(alone, small: settings.Train, tmp_path: Path):
    _, records = alone
    trained(0, dataclasses.replace(small, precision="bf16"), tmp_path / "bf16", 1)
    half = losses(tmp_path / "bf16")
    assert half != losses(tmp_path / "alone")
    assert half == pytest.approx({step: record["loss"] for step, record in records.items()}, abs=0.1)


def test_a_run_that_diverges_stops(small: settings.Train, tmp_path: Path):
    optimizer = dataclasses.replace(small.optimizer, lr=1e30, warmup=0)
    with pytest.raises(FloatingPointError, match=r"lower optimizer\.lr"):
        trained(0, dataclasses.replace(small, optimizer=optimizer), tmp_path, 1)
