"""Every figure that this project states: ours and the peers' side by side, right before they are fast.

    python -m ringattn.launch.bench bench=kernel [record=docs/benchmarks/kernel.jsonl] [key=value ...]
    python -m ringattn.launch.bench bench=scaling [parallel.ranks=4] [key=value ...]
    torchrun --nproc-per-node N -m ringattn.launch.bench bench=... [key=value ...]

Prints a table; `record=` adds a JSON line for each figure to a file. What is missing, refuses, hangs or computes
something wrong gets no figure and is named. The keys of each bench: the dataclass in its module in benchmarks/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from . import entry
from .benchmarks import kernel, memory, precision, scaling, utilization
from .benchmarks.tables import table
from .gang import Place
from .records import append_records

__all__ = ["bench"]

BENCHES = {
    "kernel": (kernel.KernelBench, kernel.run),
    "scaling": (scaling.ScalingBench, scaling.run),
    "memory": (memory.MemoryBench, memory.run),
    "precision": (precision.PrecisionBench, precision.run),
    "utilization": (utilization.UtilizationBench, utilization.run),
}


def resolve(config: DictConfig) -> Any:
    """What a composed config asks for: the settings of the bench that it names."""
    schema, _ = BENCHES[config.bench]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config))


def bench(config: DictConfig, folder: Path, place: Place) -> dict[str, Any]:
    """The job of one rank; rank 0 prints and records. Returns how many figures there are."""
    settings = resolve(config)
    _, run = BENCHES[settings.bench]
    records: list[dict[str, Any]] = []
    for found in run(settings, place):
        records += found
        if place.rank == 0 and settings.record:
            append_records(Path(settings.record), found)  # at once: who runs out of time keeps what there is
    if place.rank == 0:
        print(f"\n{table(records)}" if records else "\nno figure at all: see above")
    return {"figures": len(records)}


@hydra.main(version_base="1.3", config_path="pkg://ringattn.conf", config_name="bench")
def task(config: DictConfig) -> None:
    entry.run("ringattn.launch.bench:bench", config, resolve)


def register() -> None:
    """Give Hydra the types that `conf/bench/*.yaml` name."""
    for name, (schema, _) in BENCHES.items():
        ConfigStore.instance().store(name=f"{name}_bench_schema", node=schema)


def main() -> None:
    register()
    entry.enlist("ringattn.launch.bench")
    task()


if __name__ == "__main__":
    main()
