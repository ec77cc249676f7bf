"""What a run tells: `metrics.jsonl`, TensorBoard, and a progress bar on a terminal or plain lines elsewhere.

Only rank 0 speaks; on other ranks every call is a no-op, so that the trainer reads the same everywhere.
Records are JSON lines, `{"step": 10, "loss": 3.21, ...}`, appended and flushed one by one: a killed run keeps
them, and a resumed run goes on in the same file. `read` gives the last word on every step.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["METRICS", "Journal", "peak_memory_gib", "read"]

METRICS, LOG = "metrics.jsonl", "log.txt"
SECONDS = 2.0  # between lines on a plain console; fast runs would flood it


class Journal:
    """Where a run writes what it measures and what it has to say.

    Args:
        folder: the run's folder.
        rank: only rank 0 writes.
        steps: how many steps the whole run has, for the bar.
        tensorboard: whether to write TensorBoard events too, into `folder / tensorboard`.
    """

    def __init__(self, folder: Path, rank: int, steps: int, tensorboard: bool) -> None:
        self.speaks = rank == 0
        self.steps = steps
        self.spoke = -SECONDS
        if not self.speaks:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.records = (folder / METRICS).open("a", buffering=1)
        if cut_off(folder / METRICS):
            self.records.write("\n")  # or what follows would go down with it
        self.log = (folder / LOG).open("a", buffering=1)
        self.console = Console(highlight=False, soft_wrap=True)
        self.events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a slow import that quick runs do without

            self.events = SummaryWriter(str(folder / "tensorboard"))
        self.bar = None
        if self.console.is_terminal:
            columns = (BarColumn(20), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task("", total=steps)
            self.bar.start()

    def say(self, text: str) -> None:
        """A line for people."""
        if self.speaks:
            self.console.print(text, markup=False)
            self.log.write(text + "\n")

    def write(self, step: int, **values: float) -> None:
        """A record: what was measured at a step, for programs and for people."""
        if not self.speaks:
            return
        self.records.write(json.dumps({"step": step, **values}) + "\n")
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
        said = "  ".join(f"{name} {spell(name, value)}" for name, value in values.items())
        line = f"step {step}/{self.steps}  {said}"
        self.log.write(line + "\n")
        if self.bar and "loss" in values:
            short = f"step {step}/{self.steps}  loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s"
            self.bar.update(self.task, completed=step, description=short)
        elif "loss" not in values or step == self.steps or time.monotonic() - self.spoke > SECONDS:
            self.spoke = time.monotonic()
            self.console.print(line, markup=False)

    def close(self) -> None:
        if not self.speaks:
            return
        if self.bar:
            self.bar.stop()
        if self.events:
            self.events.close()
        self.records.close()
        self.log.close()


def spell(name: str, value: float) -> str:
    """A value as people read it.

    Example:
        >>> spell("loss", 3.14159), spell("tokens_per_second", 12345.6), spell("lr", 0.001)
        ('3.1416', '12,346', '1.00e-03')
    """
    if name == "lr":
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}" if "loss" in name else f"{value:.3g}"


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank ever held: what torch allocated on a GPU, or the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def cut_off(path: Path) -> bool:
    """Whether the last line lacks its end: a run was killed while writing it."""
    content = path.read_bytes()
    return bool(content) and not content.endswith(b"\n")


def read(folder: Path) -> dict[int, dict[str, Any]]:
    """Records of a run by step, in order; of a step that was run twice (after a resume), the later values."""
    steps: dict[int, dict[str, Any]] = {}
    with (folder / METRICS).open() as file:
        for line in file:
            if not line.endswith("}\n"):
                continue  # cut off
            record = json.loads(line)
            steps.setdefault(record["step"], {}).update(record)
    return dict(sorted(steps.items()))
