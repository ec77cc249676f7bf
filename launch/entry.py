"""One command, two ways in.

    python -m MODULE [-m] key=value ...                      composes once and starts a gang of ranks, one per job
    torchrun --nproc-per-node N -m MODULE key=value ...      ranks exist already

`-m` sweeps: every job gets a fresh gang, and a row in `<sweep folder>/results.csv` when it ends, failed or not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.errors import record

from . import gang
from .results import RESULTS, append_row

__all__ = ["enlist", "run"]


def enlist(module: str) -> None:
    """Ready torchrun's command line, before Hydra reads it: refuse a sweep, and let no rank but the first make a
    folder or a log. Does nothing where torchrun did not start this process."""
    if not dist.is_torchelastic_launched():
        return
    tail = sys.argv[1:]
    if any(word in ("-m", "--multirun") or word.startswith("hydra.mode=MULTIRUN") for word in tail):
        words = [word for word in tail if word not in ("-m", "--multirun")]
        command = " ".join([f"python -m {module} -m", *words, f"parallel.ranks={os.environ['WORLD_SIZE']}"])
        sys.exit(f"a sweep inside torchrun would hang: its ranks cannot start anew per job. Run instead:\n  {command}")
    if os.environ["RANK"] != "0":
        sys.argv += [
            "hydra.run.dir=.",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        ]


def run(job: str, config: DictConfig, resolve: Callable[[DictConfig], Any]) -> dict[str, Any]:
    """Run a job on the ranks that torchrun started, or on a gang started for it.

    Args:
        job: `module:function`, a `gang.Job`.
        config: as Hydra composed it; `config.parallel` says how many ranks on which device.
        resolve: raises if the config makes no sense, before any rank is started.

    Returns:
        What the job returned on rank 0.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    if not dist.is_torchelastic_launched():
        return as_parent(job, config, folder, resolve)
    result = as_rank(job, config, folder)
    assert result is not None  # only to the eyes of `record`
    return result


def as_parent(job: str, config: DictConfig, folder: Path, resolve: Callable[[DictConfig], Any]) -> dict[str, Any]:
    """Start a gang for this job; in a sweep, leave a row whatever becomes of it."""
    hydra_config = HydraConfig.get()
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    row: dict[str, object] = {"job": folder.name, "status": "interrupted"}
    row |= dict(override.lstrip("+").split("=", 1) for override in hydra_config.overrides.task)
    try:
        config.parallel.ranks = config.parallel.ranks or gang.default_ranks()
        resolve(config)
        result = gang.launch(job, config, folder, config.parallel.ranks)
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
def as_rank(job: str, config: DictConfig, folder: Path) -> dict[str, Any]:
    """Run as one of torchrun's ranks, with rank 0's config and folder."""
    module, name = job.split(":")
    function: gang.Job = getattr(import_module(module), name)
    with gang.joined(config.parallel.device) as place:
        asked = config.parallel.ranks
        if asked not in (None, place.size):
            raise ValueError(f"parallel.ranks={asked} but torchrun started {place.size}; leave parallel.ranks out")
        config.parallel.ranks = place.size
        # Every rank composed on its own, perhaps from other files and certainly at another time of day.
        shared = [OmegaConf.to_container(config, resolve=True), str(folder)]
        if place.size > 1:
            dist.broadcast_object_list(shared, src=0)
        return function(DictConfig(shared[0]), Path(str(shared[1])), place)
