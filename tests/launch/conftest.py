"""A little text to train on, and settings small enough for a test."""

from pathlib import Path

import pytest

from ringattn.launch import settings
from tests.gang import processes

# The fork server imports what ranks of these tests need once, before any of them starts.
processes.set_forkserver_preload(["tests.gang", "ringattn.launch.trainer"])


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 files of some hundred bytes each: enough for both splits to hold several."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(60):
        lines = (f"line {line} of file {number} ends here.\n" for line in range(10 + number % 7))
        (folder / f"{number}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small(text: Path, cache: Path) -> settings.Train:
    """A run of a few steps; 50 tokens divide neither by 4 nor by 3 ranks."""
    return settings.Train(
        steps=6,
        log_every=1,
        validate_every=3,
        validation_batches=2,
        tensorboard=False,
        precision="fp32",
        model=settings.Model(layers=2, dim=32, heads=4, kv_heads=2, hidden=48),
        data=settings.Data(folder=str(text), glob="*.txt", cache=str(cache), seq_len=50, batch=4, validation_share=0.2),
        optimizer=settings.Optimizer(lr=1e-2, warmup=2),
        parallel=settings.Parallel(device="cpu"),
        checkpoint=settings.Checkpoint(every=0, resume="none"),
    )


@pytest.fixture
def overrides(small: settings.Train) -> list[str]:
    """The same on a command line."""
    words = [f"steps={small.steps}", "log_every=1", "validate_every=0", "tensorboard=false", "precision=fp32"]
    words += [f"model.{key}={value}" for key, value in vars(small.model).items()]
    words += [f"data.{key}={'null' if value is None else value}" for key, value in vars(small.data).items()]
    return [*words, "optimizer.warmup=2", "parallel.device=cpu", "checkpoint=none"]
