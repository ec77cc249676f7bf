"""What happens in the worker of one rank: one command after the other, all ranks the same, in one process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ..oracle import Case, Inputs, Result, make_inputs
from .across import Across, Local, Share, cut
from .implementations import Ours
from .local import Implementation
from .timing import Meter, hold, slowest
from .torch_kernels import BY_TORCH
from .tracing import Interval, intervals, most_allocated, trace
from .truth import Truth, one_head

__all__ = ["Station"]


class Station:
    """One rank: a place in a process group, and a case."""

    def __init__(self, rank: int, size: int, device: torch.device, where: tuple[str, int, int], patience: float):
        self.rank, self.size, self.device = rank, size, device
        host, port, attempt = where
        wait = timedelta(seconds=patience)
        store = PrefixStore(str(attempt), TCPStore(host, port, is_master=False, timeout=wait))
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        # A collective that outlives the parent's patience by far ends this process, should the parent be gone.
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=4 * wait)
        self.truth: Truth | None = None

    def load(self, case: Case, seed: int) -> None:
        self.case, self.seed = case, seed
        self.truth = None

    def learn(self) -> None:
        """Finds out what is right: the last key/value head, whose addresses are the highest."""
        case = self.case
        self.truth = Truth(case, self.whole(), case.batch - 1, case.kv_heads - 1)
        self.tidy()

    def forget(self) -> None:
        self.truth = None

    def whole(self) -> Inputs:
        """The whole sequence, the same on every rank."""
        return make_inputs(self.case, self.seed, self.device)

    def refuses(self, each: Across) -> str | None:
        nothing = make_inputs(self.case._replace(seq_len=0), 0, self.device)
        return each.refuses(nothing, self.case, self.size)

    def examine(self, each: Across) -> str | None:
        """What this rank's part of a result has wrong."""
        assert self.truth is not None
        case = self.case
        x = cut(each, self.whole(), self.case, self.rank, self.size)
        with each.ready(case, self.device):
            self.poison(x)
            parts = self.differentiate(each, x)
        result = Result(*(part.transpose(1, 2) if each.heads_first else part for part in parts))
        infinite = [name for name, part in zip(Result._fields, result, strict=True) if not part.isfinite().all()]
        if infinite:
            return f"{', '.join(infinite)}: values that are not finite"
        tokens = each.arrange(case, self.size).positions(self.rank).to(self.device)
        faults = self.truth.faults(one_head(result, case.batch - 1, case.kv_heads - 1, case.kv_heads), tokens)
        del x, parts, result
        self.tidy()
        told = (f"{part} errs {error:.1e}, allowed {allowed:.1e}" for part, (error, allowed) in faults.items())
        return ", ".join(told)

    def poison(self, x: Inputs) -> None:
        """Leaves NaN in the memory that outputs will be allocated from."""
        dtype = torch.promote_types(self.case.dtype, torch.float32)
        poisoned = [torch.full_like(tensor, torch.nan, dtype=dtype) for tensor in x]
        del poisoned

    def differentiate(self, each: Across, x: Inputs) -> tuple[Tensor, ...]:
        """out, dq, dk, dv; the backward in this thread, as in our trainer."""
        q, k, v = (tensor.detach().requires_grad_() for tensor in x[:3])
        out = each.attend(q, k, v, self.case)
        with torch.autograd.set_multithreading_enabled(False):
            return out.detach(), *torch.autograd.grad(out, (q, k, v), x.dout)

    @contextmanager
    def ready(self, each: Across, which: str) -> Iterator[tuple[Callable[[], object], Inputs]]:
        """One pass of an implementation, ready to be called and called before, and its inputs."""
        x = cut(each, self.whole(), self.case, self.rank, self.size)

        def forward() -> None:
            with torch.no_grad():
                each.attend(x.q, x.k, x.v, self.case)

        with each.ready(self.case, self.device):
            work = {"forward": forward, "forward+backward": lambda: self.differentiate(each, x)}[which]
            work()
            yield work, x
        self.tidy()

    def time(self, each: Across, which: str, meter: Meter) -> dict[str, Any]:
        """What `meter` finds of one pass on this rank, and on GPUs the most memory that it took, in GiB."""
        before = self.allocated()
        with self.ready(each, which) as (work, x):
            self.reset_peak()
            found = meter.measure(work, self.device)
            gib = self.peak(each, before) if self.device.type == "cuda" else None
            return found | {"gib": gib, "expects": each.expects(x, self.case, which)}

    def weigh(self, each: Across, which: str) -> dict[str, Any]:
        """The most memory that one pass takes on this rank, inputs included, in GiB; and who ran, and the budget that
        it named."""
        before = self.allocated()
        with self.ready(each, which) as (work, x):
            if self.device.type == "cuda":
                self.reset_peak()
                work()
                gib = self.peak(each, before)
            else:
                events = trace(work, self.device, memory=True)
                gib = (most_allocated(events) + sum(tensor.nbytes for tensor in x)) / 2**30
            told = each.expects(x, self.case, which)
            return {"peak_memory_gib": gib} | {key: told[key] for key in ("executor", "predicted_gib")}

    def follow(self, each: Across, which: str) -> list[Interval]:
        """When this rank computed and communicated in one pass that all ranks began together."""

        def steps() -> None:
            if self.device.type == "cuda":
                work()  # brings the ranks together
                hold(self.device)
            work()

        with self.ready(each, which) as (work, _):
            slowest(0.0)
            trace(steps, self.device)  # the profiler's own start is slow
            slowest(0.0)
            return intervals(trace(steps, self.device))

    def time_alone(self, kernel: str, which: str, meter: Meter) -> dict[str, Any]:
        """One GPU, the whole sequence; all ranks do the same."""
        return self.time_local(Ours(kernel), self.case, which, meter)

    def time_torch(self, kernel: str, which: str, meter: Meter) -> dict[str, Any]:
        """The same with torch's own call of a kernel, without what our interface adds to it."""
        each = BY_TORCH[kernel] if self.device.type == "cuda" else Ours(kernel)
        return self.time_local(each, self.case, which, meter)

    def time_share(self, local: Local, which: str, meter: Meter) -> dict[str, Any]:
        """This rank's share of the work, all that it needs being there."""
        return self.time_local(Share(local, self.rank, self.size), self.case, which, meter)

    def time_local(self, each: Implementation, case: Case, which: str, meter: Meter) -> dict[str, Any]:
        """What `meter` finds, the host running ahead."""
        x = each.prepare(make_inputs(case, self.seed, self.device), case)
        work = {
            "forward": lambda: each.forward(x, case),
            "forward+backward": lambda: each.backward(x, each.forward(x, case), case),
        }[which]
        work()
        found = meter.measure_ahead(work, self.device)
        self.tidy()
        return found

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self, each: Across, before: int) -> float:
        """In GiB, less what was there before."""
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before + each.held()) / 2**30

    def tidy(self) -> None:
        """Gives unused memory back, so that everybody starts from the same state."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
