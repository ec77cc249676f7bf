"""What happens in the process of a local implementation: one command after the other, on the inputs of one case."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..oracle import Case, Inputs, Result, make_inputs
from .local import Implementation, Saved
from .timing import FLUSH_BYTES, samples_ms
from .truth import one_head

__all__ = ["Desk"]


class Desk:
    """An implementation, and the inputs of one case."""

    def __init__(self, implementation: Implementation, device: torch.device):
        self.implementation = implementation
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def load(self, case: Case, seed: int) -> str | None:
        """Makes the inputs; returns why the implementation refuses them, if it does."""
        self.drop()
        self.case, inputs = case, make_inputs(case, seed, self.device)
        refusal = self.implementation.refuses(inputs, case)
        self.x: Inputs = self.implementation.prepare(inputs, case) if refusal is None else inputs
        return refusal

    def check(self, batch: int, group: int) -> list[np.ndarray]:
        """One key/value head of out, dq, dk and dv, as bytes; raises if anything anywhere is not finite."""
        self.poison()
        saved = self.implementation.forward(self.x, self.case)
        parts = [saved[0].detach(), *self.implementation.backward(self.x, saved, self.case)]
        result = Result(*(self.implementation.turned(part) for part in parts))
        for name, part in zip(Result._fields, result, strict=True):
            if not part.isfinite().all():
                raise ValueError(f"{name} holds values that are not finite")
        heads = one_head(result, batch, group, self.case.kv_heads)
        told = [head.cpu().contiguous().view(torch.uint8).numpy() for head in heads]
        del saved, parts, result, heads
        self.tidy()
        return told

    def poison(self) -> None:
        """Leaves NaN in the memory that outputs will be allocated from."""
        dtype = torch.promote_types(self.case.dtype, torch.float32)
        poisoned = [torch.full_like(x, torch.nan, dtype=dtype) for x in self.x]
        del poisoned

    def measure(self, which: str, budget_ms: float, least: int, most: int) -> tuple[list[float], float | None]:
        """Milliseconds of each call, and the most memory that was allocated, in GiB."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = samples_ms(self.work(which), self.device, budget_ms, least, most)
        peak = (torch.cuda.max_memory_allocated() - FLUSH_BYTES) / 2**30 if on_gpu else None
        self.tidy()
        return times, peak

    def work(self, which: str) -> Callable[[], object]:
        """A pass, ready to be called."""
        implementation, x, case = self.implementation, self.x, self.case
        saved: Saved = implementation.forward(x, case) if which == "backward" else ()
        return {
            "forward": lambda: implementation.forward(x, case),
            "backward": lambda: implementation.backward(x, saved, case),
            "forward+backward": lambda: implementation.backward(x, implementation.forward(x, case), case),
        }[which]

    def drop(self) -> None:
        """Gives the memory of a case back."""
        self.x = None  # pyright: ignore[reportAttributeAccessIssue]
        self.tidy()

    def tidy(self) -> None:
        """Leaves the memory that is not held to the other workers of this GPU."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
