"""What benches across ranks have in common: the shape, the implementations, where and how long."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ringattn.kernels.registry import KERNELS, choose_kernel
from ringattn.layout import LAYOUTS

from ..gang import Place
from ..oracle import Case
from ..settings import Parallel, require, require_one_of
from .across import NAMED_EXECUTORS, Across, ours_across
from .baselines import AllGather, Ulysses
from .cases import DTYPES, matching, require_mask
from .crew import Crew
from .flex import TorchFlexParallel
from .kernel import SPECIFICATION
from .masks import mask_fields
from .peers import RINGS, RingFlashAttention, RingFlashAttentionPacked, TorchContextParallel
from .station import Station
from .workers import preload

__all__ = ["ACROSS_PASSES", "AcrossRanks", "across_implementations", "make_crew", "standard"]

ACROSS_PASSES = ("forward", "forward+backward")


def across_implementations(peer_kernel: str, causal: bool) -> dict[str, Across]:
    """All that is known, by name: ours first, then the peers over a kernel of torch."""
    peers = [
        *(TorchContextParallel(rotation, peer_kernel, causal) for rotation in ("allgather", "alltoall")),
        TorchFlexParallel(),
        *(RingFlashAttention(variant, peer_kernel) for variant in RINGS),
        RingFlashAttentionPacked(),
        Ulysses(peer_kernel),
        AllGather(peer_kernel, causal),
    ]
    return {each.name: each for each in (*ours_across(), *peers)}


def standard(kernel: str, layout: str = "zigzag") -> set[str]:
    """Of ours, what is measured unless asked otherwise: from this layout through the ring over this kernel, one thing
    changed at a time."""
    ways = {
        *((each, "ring", layout) for each in KERNELS),
        *((kernel, each, layout) for each in NAMED_EXECUTORS),
        *((kernel, "ring", each) for each in LAYOUTS),
    }
    names = {f"ringattn-{'-'.join(way)}" for way in ways}
    return {name for name in names if not name.startswith(SPECIFICATION)}


@dataclass(kw_only=True)
class AcrossRanks:
    """One shape of heads, some numbers of tokens on each rank."""

    bench: str = ""
    tokens: list[int] = field(default_factory=list)  # on each rank; empty: what the bench thinks fit for the device
    batch: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mask: str = "causal"
    dtype: str = "auto"  # auto: bf16 on GPUs, else fp32
    passes: list[str] = field(default_factory=lambda: list(ACROSS_PASSES))
    implementations: list[str] = field(default_factory=list)  # names or patterns; empty: `standard`
    peer_kernel: str = "auto"  # beneath the peers: cudnn, aten (FlashAttention-2); auto: cudnn on GPUs
    patience: float = 120.0  # seconds until workers that do not answer are ended
    seed: int = 0
    record: str | None = None  # a file of JSON lines to add the results to
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self) -> None:
        for key in ("batch", "q_heads", "kv_heads", "head_dim"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(min(self.tokens, default=1) >= 1, "tokens", self.tokens, "numbers of at least 1")
        require(self.q_heads % self.kv_heads == 0, "kv_heads", self.kv_heads, f"a divisor of q_heads={self.q_heads}")
        require_mask("mask", self.mask)
        require_one_of("dtype", self.dtype, ("auto", *DTYPES))
        require_one_of("peer_kernel", self.peer_kernel, ("auto", "cudnn", "aten"))
        for which in self.passes:
            require_one_of("passes", which, ACROSS_PASSES)
        matching("implementations", self.implementations, across_implementations("aten", True))
        require(self.patience > 0, "patience", self.patience, "more than 0 seconds")

    def chosen(self, device: torch.device) -> list[Across]:
        auto = "cudnn" if device.type == "cuda" and self.head_dim <= 128 else "aten"
        known = across_implementations(auto if self.peer_kernel == "auto" else self.peer_kernel, self.mask != "none")
        if self.implementations:
            return matching("implementations", self.implementations, known)
        balanced = "balanced" if "balanced" in LAYOUTS and self.mask not in ("causal", "none") else "zigzag"
        ours = standard(self.kernel_on(device), balanced)
        return [each for name, each in known.items() if name in ours or not name.startswith("ringattn-")]

    def kernel_on(self, device: torch.device) -> str:
        """The kernel that is chosen unless one is asked for."""
        nothing = torch.empty(1, 0, 1, self.head_dim, dtype=self.type_on(device), device=device)
        return choose_kernel("auto", nothing, nothing, nothing).kernel.name

    def type_on(self, device: torch.device) -> torch.dtype:
        auto = "bf16" if device.type == "cuda" else "fp32"
        return DTYPES[auto if self.dtype == "auto" else self.dtype]

    def sequences(self, device: torch.device, ranks: int, tokens: dict[str, tuple[int, ...]]) -> list[Case]:
        """A case for each number of tokens; `tokens` says what is fit, by the kind of device."""
        heads = (self.q_heads, self.kv_heads, self.head_dim)
        held = self.tokens or tokens[device.type]
        lengths = [each * ranks for each in held]
        dtype = self.type_on(device)
        return [Case(each, self.batch, *heads, dtype=dtype, **mask_fields(self.mask, each)) for each in lengths]


def make_crew(place: Place, size: int, patience: float) -> Crew:
    """Stations on the first `size` ranks."""
    slow = ["torch._dynamo"] if place.device.type == "cpu" else []  # seconds to import; it may touch a GPU
    preload(Station.__module__, *slow)
    return Crew(Station, place, size, patience)
