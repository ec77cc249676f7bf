"""Checkpoints through torch.distributed.checkpoint: whole or absent, and free of the number of ranks.

    <run>/checkpoints/step-00000200/    a finished checkpoint: model, optimizer, step, data, random state
    <run>/checkpoints/step-00000400.part/    one being written, or cut off; never read

Parameters are the same on every rank, so ranks share the writing and any number of ranks can read.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

__all__ = ["find", "load", "save"]

FOLDER = "checkpoints"


def save(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, Any], keep: int
) -> None:
    """Write a checkpoint (every rank calls this); older ones beyond `keep` go once it stands."""
    final = run / FOLDER / f"step-{step:08d}"
    aside = final.with_suffix(".part")
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    barrier()
    with alone_on_purpose():
        state = _state(model, optimizer, step, data)
        state_dict_saver.save(state, checkpoint_id=aside, no_dist=not dist.is_initialized())
    barrier()
    if rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in finished(run)[:-keep]:
            shutil.rmtree(old)
    barrier()


def find(run: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` means: the newest here (`auto`, may be None), none, or one in a given folder.

    Raises:
        FileNotFoundError: a folder was given that neither is a checkpoint nor holds one.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return max(finished(run), default=None)
    given = Path(resume).expanduser()
    if (given / ".metadata").is_file():
        return given
    found = max(finished(given), default=None)
    if found is None:
        raise FileNotFoundError(
            f"checkpoint.resume={resume}: neither a checkpoint nor a run's folder that holds one; "
            f"expected {given}/{FOLDER}/step-*, or use auto or none"
        )
    return found


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, Any]) -> int:
    """Bring model, optimizer and random state to where the checkpoint left them.

    Gradients must not exist yet: torch fills a fresh optimizer's state by a step on zero gradients of its own.

    Returns:
        The number of steps done.

    Raises:
        ValueError: the checkpoint was trained on other data or with another seed.
        torch.distributed.checkpoint.CheckpointException: it holds another model.
    """
    state = _state(model, optimizer, 0, data)
    with alone_on_purpose():
        state_dict_loader.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    for key, expected in data.items():
        if state["data"][key] != expected:
            raise ValueError(
                f"{path} was written with data {key}={state['data'][key]}, this run has {expected}: "
                "the losses would not continue; start anew with checkpoint.resume=none"
            )
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    torch.set_rng_state(state["random"])
    return state["step"]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, data: dict[str, Any]) -> dict[str, Any]:
    parameters, moments = get_state_dict(model, optimizer)
    random = torch.get_rng_state()
    return {"model": parameters, "optimizer": moments, "step": step, "data": dict(data), "random": random}


def finished(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(path for path in (run / FOLDER).glob("step-*") if not path.suffix)


@contextmanager
def alone_on_purpose() -> Iterator[None]:
    """Without torch's warning that a single process saves or loads, which it gives even where that was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
