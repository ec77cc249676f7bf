"""Measurements on record: JSON lines that say where, when and on what code they were made.

Committed under docs/benchmarks/ and written only by the project's own commands.
"""

from __future__ import annotations

import json
import os
import subprocess
from datetime import date
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

import ringattn

__all__ = ["append_records", "circumstances", "read_records"]

ROOT = Path(__file__).resolve().parent.parent


def circumstances(gpus: int) -> dict[str, Any]:
    """Date, code, machine, versions and a fresh run id; the same for every record of a run.

    The commit is git's, or the environment's RINGATTN_COMMIT where the code runs outside a checkout.
    """
    told = os.environ.get("RINGATTN_COMMIT")
    cuda = torch.cuda.is_available()
    return {
        "date": date.today().isoformat(),
        "commit": told or git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": told is None and bool(git("status", "--porcelain")),
        "gpu": torch.cuda.get_device_name() if cuda else "none",
        "gpus": gpus if cuda else 0,
        "driver": driver(),
        "ringattn": ringattn.__version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "run": uuid4().hex[:12],
    }


def git(*arguments: str) -> str:
    """What git says of this package's checkout; empty where there is none."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def driver() -> str:
    """The version of NVIDIA's driver; "none" where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "none"


def version_of(package: str) -> str:
    """The installed version of a package, or "none"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def append_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Adds a line per record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()]
