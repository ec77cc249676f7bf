"""What torch's profiler saw of some work, in the words of the trace that it exports."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Interval", "intervals", "most_allocated", "trace"]

ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
TRAVELS = ("nccl", "gloo:", "PtoP", "P2P")  # in the name of what moves data between ranks
HOLDS = "spin_kernel"  # what `timing.hold` launches; nobody's work
Interval = tuple[str, float, float, str]


def trace(work: Callable[[], object], device: torch.device, memory: bool = False) -> list[dict[str, Any]]:
    """The events of some work; "ts" is in microseconds of a clock that all processes of a machine share."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities, profile_memory=memory, acc_events=True) as profiler:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        told = json.loads(path.read_text())
    base = told.get("baseTimeNanoseconds", 0) / 1e3
    return [event | {"ts": float(event["ts"]) + base} for event in told["traceEvents"] if "ts" in event]


def most_allocated(events: list[dict[str, Any]]) -> int:
    """The most bytes on the host that were held at once, of those allocated meanwhile."""
    changes = (event["args"]["Bytes"] for event in events if event["name"] == "[memory]")
    return max(accumulate(changes), default=0)


def intervals(events: list[dict[str, Any]]) -> list[Interval]:
    """(what, start, end, name) in microseconds of each stretch of "compute" and of "communication".

    On GPUs these are kernels and copies after the last `hold`; on CPUs attention and what gloo does.
    """
    found: list[Interval] = []
    holds = [event["ts"] for event in events if event.get("cat") in ON_GPU and HOLDS in event["name"]]
    begin = max(holds, default=0.0)
    gpu = any(event.get("cat") in ON_GPU for event in events)
    for event in events:
        name = event["name"]
        if HOLDS in name or event["ts"] < begin:
            continue
        travels = any(word in name for word in TRAVELS)
        counts = event.get("cat") in ON_GPU if gpu else travels or ("aten::" in name and "attention" in name)
        if counts and "dur" in event:
            what = "communication" if travels else "compute"
            found.append((what, event["ts"], event["ts"] + float(event["dur"]), name))
    return sorted(found, key=lambda interval: interval[1])
