"""Checkpoints: whole or absent, and the same run goes on from them on any number of ranks."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from ringattn.launch import checkpoint, metrics, settings
from ringattn.launch.gang import Place
from ringattn.launch.trainer import Trainer
from tests.gang import run_ranks

pytestmark = pytest.mark.timeout(90)


def run(rank: int, chosen: settings.Train, folder: Path, ranks: int) -> None:
    Trainer(chosen, folder, Place(rank, ranks, torch.device("cpu"), "a test")).run()


def losses(folder: Path, first: int) -> dict[int, float]:
    return {step: record["loss"] for step, record in metrics.read(folder).items() if step >= first}


@pytest.fixture
def saving(small: settings.Train) -> settings.Train:
    return dataclasses.replace(small, checkpoint=settings.Checkpoint(every=3), validate_every=0)


def test_four_ranks_continue_on_two_and_on_one(saving: settings.Train, tmp_path: Path):
    run_ranks(4, run, saving, tmp_path / "four", 4)
    expected = losses(tmp_path / "four", first=4)
    origin = str(tmp_path / "four" / "checkpoints" / "step-00000003")
    resumed = dataclasses.replace(saving, checkpoint=settings.Checkpoint(every=0, resume=origin))
    run_ranks(2, run, resumed, tmp_path / "two", 2)
    run(0, resumed, tmp_path / "one", 1)
    for name in ("two", "one"):
        assert min(metrics.read(tmp_path / name)) == 4, "begins after the checkpoint's step"
        assert losses(tmp_path / name, first=4) == pytest.approx(expected, abs=2e-5)


def test_auto_goes_on_from_the_newest_whole_one(saving: settings.Train, tmp_path: Path):
    run(0, saving, tmp_path / "through", 1)
    run(0, saving, tmp_path / "cut", 1)
    folder = tmp_path / "cut" / "checkpoints"
    (folder / "step-00000006").rename(folder / "step-00000006.part")  # as if killed while writing the last
    (tmp_path / "cut" / metrics.METRICS).unlink()
    run(0, saving, tmp_path / "cut", 1)
    assert losses(tmp_path / "cut", first=1) == losses(tmp_path / "through", first=4), "to the last bit on equal ranks"
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000003", "step-00000006"]


def test_everything_comes_back(tmp_path: Path):
    def fresh(seed: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = fresh(0)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path, 7, model, optimizer, {"seed": 3}, keep=1)
    drawn = torch.rand(4)
    other, its_optimizer = fresh(1)
    path = checkpoint.find(tmp_path, "auto")
    assert path is not None
    assert checkpoint.load(path, other, its_optimizer, {"seed": 3}) == 7
    assert torch.equal(torch.rand(4), drawn)
    assert torch.equal(other.weight, model.weight)
    for moment in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(its_optimizer.state[other.weight][moment], optimizer.state[model.weight][moment])


def test_old_ones_go(saving: settings.Train, tmp_path: Path):
    run(0, dataclasses.replace(saving, checkpoint=settings.Checkpoint(every=1, keep=2)), tmp_path, 1)
    assert [path.name for path in checkpoint.finished(tmp_path)] == ["step-00000005", "step-00000006"]


def test_where_to_begin(tmp_path: Path):
    assert checkpoint.find(tmp_path, "auto") is None
    assert checkpoint.find(tmp_path, "none") is None
    for name in ("step-00000002", "step-00000010", "step-00000012.part"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.find(tmp_path, "none") is None
    newest = tmp_path / "checkpoints" / "step-00000010"
    assert checkpoint.find(tmp_path, "auto") == checkpoint.find(Path("elsewhere"), str(tmp_path)) == newest
    with pytest.raises(FileNotFoundError, match=r"neither a checkpoint nor a run's folder"):
        checkpoint.find(tmp_path, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("change", "message"), [({"seed": 1}, "data seed=0, this run has 1"), ({}, "data digest=")])
def test_other_data_is_refused(saving: settings.Train, tmp_path: Path, change: dict, message: str):
    run(0, dataclasses.replace(saving, steps=3), tmp_path, 1)
    if not change:
        (tmp_path / "text").mkdir()
        for number in range(40):
            (tmp_path / "text" / f"{number}.txt").write_text("other text " * 30)
        change = {"data": dataclasses.replace(saving.data, folder=str(tmp_path / "text"))}
    with pytest.raises(ValueError, match=message):
        run(0, dataclasses.replace(saving, **change), tmp_path, 1)
