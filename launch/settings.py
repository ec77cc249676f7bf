"""What a training run can be told: one dataclass per group of `conf/`, checked when it is made.

Hydra composes `conf/train.yaml` against these types, so a misspelt key or a wrong type fails before a rank
starts; `resolve` turns the composed config into a `Train`, and `__post_init__` checks what types cannot say.
Names of layouts, kernels and executors are checked by `ringattn.ContextParallel`, which knows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

__all__ = ["Checkpoint", "Data", "Model", "Optimizer", "Parallel", "Train", "register", "resolve"]


def require(holds: bool, key: str, got: object, expected: str) -> None:
    """Raise ValueError naming the key, what it got and what it takes, unless `holds`."""
    if not holds:
        raise ValueError(f"{key}={got}: expected {expected}")


def require_one_of(key: str, got: str, names: Sequence[str]) -> None:
    require(got in names, key, got, "one of " + ", ".join(names))


@dataclass(kw_only=True)
class Model:
    """A decoder-only transformer over bytes."""

    layers: int = 4
    dim: int = 256
    heads: int = 8
    kv_heads: int = 2
    hidden: int = 704
    rope_base: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def __post_init__(self) -> None:
        for key in ("layers", "dim", "heads", "kv_heads", "hidden"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "at least 1")
        require(self.dim % self.heads == 0, "model.dim", self.dim, f"a multiple of model.heads={self.heads}")
        require(self.head_dim % 2 == 0, "model.dim", self.dim, f"an even head dim for RoPE, not {self.head_dim}")
        require(self.heads % self.kv_heads == 0, "model.kv_heads", self.kv_heads, f"a divisor of heads={self.heads}")
        require(self.rope_base > 1, "model.rope_base", self.rope_base, "more than 1")


@dataclass(kw_only=True)
class Data:
    """Text, byte by byte. `folder` null stands for the sources of Python's standard library."""

    folder: str | None = None
    glob: str = "**/*.py"
    exclude: str = "site-packages"  # files whose path holds this are left out
    seq_len: int = 1024
    batch: int = 8  # sequences per step, over all ranks
    document_mean: int | None = None  # pack documents of log-normal lengths, so many bytes on average; null: one text
    document_longest: int = 32768
    document_spread: float = 1.0  # standard deviation of the logarithm of the lengths
    validation_share: float = 0.05
    cache: str | None = None  # null: ~/.cache/ringattn

    def __post_init__(self) -> None:
        require(self.seq_len >= 1, "data.seq_len", self.seq_len, "at least 1")
        require(self.batch >= 1, "data.batch", self.batch, "at least 1 sequence per step, over all ranks")
        if self.document_mean is not None:
            require(self.document_mean >= 1, "data.document_mean", self.document_mean, "at least 1 byte, or null")
        require(self.document_longest >= 1, "data.document_longest", self.document_longest, "at least 1 byte")
        require(self.document_spread >= 0, "data.document_spread", self.document_spread, "0 or more")
        require(0 < self.validation_share < 1, "data.validation_share", self.validation_share, "between 0 and 1")


@dataclass(kw_only=True)
class Optimizer:
    """AdamW with a linear warm-up and a cosine down to `final_share` of the learning rate."""

    lr: float = 1e-3
    warmup: int = 20
    final_share: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # the largest global gradient norm

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "more than 0")
        require(self.warmup >= 0, "optimizer.warmup", self.warmup, "0 or more steps")
        require(0 <= self.final_share <= 1, "optimizer.final_share", self.final_share, "between 0 and 1")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"optimizer.{key}", getattr(self, key), "0 or more and below 1")
        require(self.eps > 0, "optimizer.eps", self.eps, "more than 0")
        require(self.clip > 0, "optimizer.clip", self.clip, "more than 0")


@dataclass(kw_only=True)
class Parallel:
    """Ranks and their work: `context` of them share each sequence, `ranks / context` sequences run side by side."""

    ranks: int | None = None  # null: all GPUs, else 2
    context: int | None = None  # null: all ranks
    device: str = "auto"
    layout: str = "zigzag"
    kernel: str = "auto"
    executor: str = "auto"

    def __post_init__(self) -> None:
        require_one_of("parallel.device", self.device, ("auto", "cpu", "cuda"))
        require(self.ranks is None or self.ranks >= 1, "parallel.ranks", self.ranks, "at least 1, or null for all GPUs")
        require(self.context is None or self.context >= 1, "parallel.context", self.context, "at least 1, or null")


@dataclass(kw_only=True)
class Checkpoint:
    """When to write, how many to keep, where to begin."""

    every: int = 200  # steps; 0: never
    keep: int = 2
    resume: str = "auto"  # auto: the newest in this run's folder; none; or a folder

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every", self.every, "a number of steps, or 0 for never")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")
        require(bool(self.resume), "checkpoint.resume", repr(self.resume), "auto, none or a folder")


@dataclass(kw_only=True)
class Train:
    """A training run."""

    steps: int = 1000
    seed: int = 0
    precision: str = "auto"  # auto: bf16 on GPUs, else fp32
    deterministic: bool = False
    log_every: int = 10
    validate_every: int = 100
    validation_batches: int = 4
    tensorboard: bool = True
    record: str | None = None  # a file of JSON lines to add the final metrics to
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require_one_of("precision", self.precision, ("auto", "fp32", "bf16"))
        require(self.log_every >= 1, "log_every", self.log_every, "at least 1")
        require(self.validate_every >= 0, "validate_every", self.validate_every, "a number of steps, or 0 for never")
        require(self.validation_batches >= 1, "validation_batches", self.validation_batches, "at least 1")
        if self.parallel.ranks is not None:
            self.grid(self.parallel.ranks)

    def grid(self, ranks: int) -> tuple[int, int]:
        """(sequences side by side, ranks per sequence) of a gang of `ranks`.

        Example:
            >>> Train(parallel=Parallel(context=2)).grid(8)
            (4, 2)
        """
        context = self.parallel.context or ranks
        require(ranks % context == 0, "parallel.context", context, f"a divisor of {ranks} ranks")
        require(
            self.data.batch % (ranks // context) == 0,
            "data.batch",
            self.data.batch,
            f"a multiple of {ranks // context}: {ranks} ranks, {context} per sequence",
        )
        return ranks // context, context


def register() -> None:
    """Give Hydra the types that `conf/train.yaml` names as `train_schema`."""
    ConfigStore.instance().store(name="train_schema", node=Train)


def resolve(config: DictConfig) -> Train:
    """The settings that a composed config describes.

    Raises:
        ValueError: a value is out of range; the message names the key.
        omegaconf.errors.OmegaConfBaseException: a key is unknown or a type is wrong.
    """
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Train), config))
    assert isinstance(settings, Train)
    return settings
