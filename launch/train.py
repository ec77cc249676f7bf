"""Train a transformer with its sequence cut across ranks. Two ways in, one job:

    python -m ringattn.launch.train [-m] key=value ...                       # composes once, starts the ranks itself
    torchrun --nproc-per-node N -m ringattn.launch.train key=value ...       # ranks exist already

`-m` sweeps: every job gets a fresh gang, and a row in `<sweep folder>/results.csv` when it ends, failed or not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import hydra
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.errors import record

from . import gang, settings
from .results import RESULTS, append_row

JOB = "ringattn.launch.trainer:train"


@hydra.main(version_base="1.3", config_path="pkg://ringattn.conf", config_name="train")
def task(config: DictConfig) -> float:
    """One job; returns the loss that an optimising sweeper minimises."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    result = as_rank(config, folder) if dist.is_torchelastic_launched() else as_parent(config, folder)
    assert result is not None  # only to the eyes of `record`
    return result.get("validation_loss", result["loss"])


def as_parent(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Start a gang for this job; in a sweep, leave a row whatever becomes of it."""
    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    row: dict[str, object] = {"job": folder.name, "status": "interrupted"}
    row |= dict(override.lstrip("+").split("=", 1) for override in hydra_config.overrides.task)
    try:
        config.parallel.ranks = config.parallel.ranks or gang.default_ranks()
        settings.resolve(config)
        result = gang.launch(JOB, config, folder, config.parallel.ranks)
        row |= {"status": "ok", **result}
        return result
    except gang.GangFailed as failure:
        row |= {"status": "failed", "error": failure}
        print(failure.traceback, failure, sep="\n", file=sys.stderr)
        if sweeping:
            raise  # Hydra goes on with the next job
        sys.exit(1)
    except Exception as error:
        row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        if sweeping:
            table = Path(hydra_config.sweep.dir) / RESULTS
            append_row(table, row | {"folder": os.path.relpath(folder, table.parent)})
            print(f"job {row['job']}: {row['status']}; a row in {table}")


@record
def as_rank(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Run as one of torchrun's ranks, with rank 0's config and folder."""
    from .trainer import train  # needs more than a parent does

    with gang.joined(config.parallel.device) as place:
        asked = config.parallel.ranks
        if asked not in (None, place.size):
            raise ValueError(f"parallel.ranks={asked} but torchrun started {place.size}; leave parallel.ranks out")
        config.parallel.ranks = place.size
        # Every rank composed on its own, perhaps from other files and certainly at another time of day.
        shared = [OmegaConf.to_container(config, resolve=True), str(folder)]
        if place.size > 1:
            dist.broadcast_object_list(shared, src=0)
        return train(DictConfig(shared[0]), Path(str(shared[1])), place)


def enlist(arguments: list[str]) -> None:
    """Ready torchrun's command line: refuse a sweep, and let no rank but the first make a folder or a log."""
    tail = arguments[1:]
    if any(word in ("-m", "--multirun") or word.startswith("hydra.mode=MULTIRUN") for word in tail):
        words = [word for word in tail if word not in ("-m", "--multirun")]
        command = " ".join(["python -m ringattn.launch.train -m", *words, f"parallel.ranks={os.environ['WORLD_SIZE']}"])
        sys.exit(f"a sweep inside torchrun would hang: its ranks cannot start anew per job. Run instead:\n  {command}")
    if os.environ["RANK"] != "0":
        arguments += [
            "hydra.run.dir=.",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        ]


def main() -> None:
    settings.register()
    if dist.is_torchelastic_launched():
        enlist(sys.argv)
    task()


if __name__ == "__main__":
    main()
