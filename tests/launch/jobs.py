"""Jobs for gangs under test, and a deadline."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from ringattn.launch.gang import Place


def fail(config: DictConfig, folder: Path, place: Place) -> dict[str, Any]:
    """Rank 1 fails; rank 0, in a collective, follows and, being first in order, must not be taken for the cause."""
    if place.rank == 1:
        if config.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        raise ValueError(f"rank 1 of {place.size} fails on purpose")
    dist.all_reduce(torch.ones(1))
    return {}


def describe(config: DictConfig, folder: Path, place: Place) -> dict[str, Any]:
    """What a rank finds: its config, its gang."""
    return {"key": config.key, "size": place.size, "device": str(place.device), "distributed": dist.is_initialized()}


class Soon:
    """A deadline that passes when it has been asked twice: before the case, and before the first turn."""

    def __init__(self, seconds):
        self.asked = 0

    def passed(self):
        self.asked += 1
        return self.asked > 2
