"""Train a transformer with its sequence cut across ranks.

python -m ringattn.launch.train [-m] key=value ...
torchrun --nproc-per-node N -m ringattn.launch.train key=value ...
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from . import entry, settings


@hydra.main(version_base="1.3", config_path="pkg://ringattn.conf", config_name="train")
def task(config: DictConfig) -> float:
    """One job; returns the loss that an optimising sweeper minimises."""
    result = entry.run("ringattn.launch.trainer:train", config, settings.resolve)
    return result.get("validation_loss", result["loss"])


def main() -> None:
    settings.register()
    entry.enlist("ringattn.launch.train")
    task()


if __name__ == "__main__":
    main()
