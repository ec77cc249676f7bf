"""The training job, as one rank sees it.

    loss = sum over this rank's tokens of -log p(label)  /  count of labels that bear loss, over all ranks

Its gradients, summed over ranks, are those of the mean loss of the whole batch: one rank with the whole
sequence computes the same up to rounding. Ranks form a grid (data, context); the ranks of a row share each
sequence through one `ContextParallel`, rows work on different sequences of the batch.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

import ringattn
from ringattn.kernels.registry import choose_kernel

from . import checkpoint, settings
from .data import IGNORED, Batch, Corpus
from .gang import Place
from .metrics import Journal, peak_memory_gib
from .model import Transformer
from .optimizer import Gradients, adamw, learning_rate
from .records import append_records, circumstances

__all__ = ["Trainer", "train"]


def train(config: DictConfig, folder: Path, place: Place) -> dict[str, Any]:
    """The job that `gang.launch` and torchrun start; returns the final metrics."""
    return Trainer(settings.resolve(config), folder, place).run()


class Trainer:
    """One rank of a training run.

    Args:
        chosen: the run's settings, the same on every rank.
        folder: where rank 0 writes metrics and all ranks write checkpoints.
        place: this rank's number and device.
    """

    def __init__(self, chosen: settings.Train, folder: Path, place: Place) -> None:
        self.chosen, self.folder, self.place, self.device = chosen, folder, place, place.device
        self.journal = Journal(folder, place.rank, chosen.steps, chosen.tensorboard)
        auto = "bf16" if self.device.type == "cuda" else "fp32"
        self.precision = auto if chosen.precision == "auto" else chosen.precision
        if chosen.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(chosen.seed)

        self.grid = chosen.grid(place.size)
        group, row = None, 0
        if place.size > 1:
            mesh = init_device_mesh(self.device.type, self.grid, mesh_dim_names=("data", "context"))
            group, row = mesh["context"], mesh.get_local_rank("data")
        how = chosen.parallel
        self.cp = ringattn.ContextParallel(group, layout=how.layout, kernel=how.kernel, executor=how.executor)
        rows = chosen.data.batch // self.grid[0]
        self.rows = slice(row * rows, (row + 1) * rows)

        self.corpus = open_corpus(chosen.data, place)
        self.model = Transformer(chosen.model, chosen.seed).to(self.device)
        self.optimizer = adamw(self.model, chosen.optimizer)
        self.identity = {"digest": self.corpus.digest, "seed": chosen.seed}
        self.begun = 0
        origin = checkpoint.find(folder, chosen.checkpoint.resume)
        if origin is not None:
            self.begun = checkpoint.load(origin, self.model, self.optimizer, self.identity)
        self.gradients = Gradients(self.model.parameters())
        self.introduce(origin)

    def run(self) -> dict[str, Any]:
        """Train to the last step; returns the last of every metric."""
        chosen, last = self.chosen, {}
        clock, since = time.perf_counter(), self.begun
        for step, part in self.parts():
            loss, norm, lr = self.step(step, part)
            if step % chosen.log_every == 0 or step == chosen.steps:
                values = {"loss": loss.item(), "lr": lr, "grad_norm": norm.item()}  # .item() waits for the GPU
                seconds = (time.perf_counter() - clock) / (step - since)
                values["tokens_per_second"] = chosen.data.batch * chosen.data.seq_len / seconds
                values["ms"] = 1000 * seconds
                values["peak_memory_gib"] = peak_memory_gib(self.device)
                self.journal.write(step, **values)
                last |= values
                if not math.isfinite(values["loss"]):
                    raise FloatingPointError(f"the loss of step {step} is {values['loss']}; lower optimizer.lr")
                clock, since = time.perf_counter(), step
            if due(step, chosen.validate_every, chosen.steps):
                last["validation_loss"] = self.validate()
                self.journal.write(step, validation_loss=last["validation_loss"])
                clock, since = time.perf_counter(), step
            if due(step, chosen.checkpoint.every, chosen.steps):
                keep = chosen.checkpoint.keep
                checkpoint.save(self.folder, step, self.model, self.optimizer, self.identity, keep)
                clock, since = time.perf_counter(), step
        self.journal.close()
        if chosen.record and self.place.rank == 0:
            append_records(Path(chosen.record), [self.summary(last)])
        return last

    def parts(self) -> Iterator[tuple[int, Batch]]:
        """The steps and this rank's part of each; the next one is cut and planned while this one computes."""
        steps = range(self.begun + 1, self.chosen.steps + 1)
        with ThreadPoolExecutor(1) as aside:
            upcoming = deque(aside.submit(self.part, step, "train") for step in steps[:1])
            for step in steps:
                part = upcoming.popleft().result()
                if step + 1 in steps:
                    upcoming.append(aside.submit(self.part, step + 1, "train"))
                yield step, part

    def step(self, step: int, part: Batch) -> tuple[Tensor, Tensor, float]:
        """One update; returns the loss before it, the gradient's norm before clipping, and the learning rate."""
        lr = learning_rate(step, self.chosen.steps, self.chosen.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.gradients.clear()
        loss = self.loss(part)
        with torch.autograd.set_multithreading_enabled(False):  # else it begins when another thread has woken up
            loss.backward()
        self.gradients.sum_over_ranks()
        norm = self.gradients.clip(self.chosen.optimizer.clip)
        self.optimizer.step()
        return over_ranks(loss.detach()), norm, lr

    def part(self, step: int, split: str) -> Batch:
        """This rank's inputs and labels of a step, [B, L] each; the documents stay those of the whole sequence."""
        ids_BS, labels_BS, cu_seqlens = self.corpus.batch(self.chosen.seed, step, split, self.rows)
        if cu_seqlens is not None:
            self.cp.plan(self.chosen.data.seq_len, causal=True, cu_seqlens=cu_seqlens)  # kept for attention
        ids_BL, labels_BL = (self.cp.shard(x, cu_seqlens=cu_seqlens) for x in (ids_BS, labels_BS))
        return Batch(ids_BL, labels_BL, cu_seqlens)

    def loss(self, part: Batch) -> Tensor:
        """This rank's share of the mean loss: the shares of all ranks add up to it."""
        ids_BL, labels_BL = part.ids.to(self.device), part.labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits_BLV = self.model(ids_BL, self.cp, self.chosen.data.seq_len, part.cu_seqlens)
        summed = functional.cross_entropy(
            logits_BLV.float().flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return summed / over_ranks((labels_BL != IGNORED).sum())

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of the first batches of the validation split, always the same ones."""
        batches = self.chosen.validation_batches
        shares = [self.loss(self.part(batch, "validation")) for batch in range(batches)]
        return over_ranks(torch.stack(shares).sum()).item() / batches

    def summary(self, last: dict[str, float]) -> dict[str, Any]:
        """The run on record: what ran where, and the last of every metric."""
        chosen, shape = self.chosen, self.chosen.model
        return circumstances(self.place.size) | {
            "bench": "train",
            "ranks": self.place.size,
            "context": self.cp.size,
            "layout": self.cp.layout,
            "kernel": choose_kernel(self.cp.kernel, *self.attention_inputs()).kernel.name,
            "batch": chosen.data.batch,
            "seq_len": chosen.data.seq_len,
            "q_heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "dtype": self.precision,
            "seed": chosen.seed,
            "steps": chosen.steps,
            **last,
        }

    def introduce(self, origin: Path | None) -> None:
        """Say what was chosen and why."""
        data, shape, size = self.chosen.data, self.chosen.model, self.place.size
        documents = f"; packed, documents of {data.document_mean} on average" if data.document_mean else ""
        backend = "no torch.distributed" if size == 1 else "nccl" if self.device.type == "cuda" else "gloo"
        held = self.cp.plan(data.seq_len).layout.lengths
        per_rank = str(held[0]) if len(set(held)) == 1 else f"{min(held)} to {max(held)}"
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        megabytes = {split: size / 1e6 for split, size in self.corpus.sizes.items()}
        precision = f"{self.precision} ({'asked for' if self.chosen.precision != 'auto' else self.device.type})"
        self.journal.say(
            f"ranks: {size}, {backend}; device {self.device.type}: {self.place.reason}\n"
            f"grid: {self.grid[0]} sequence(s) side by side, {self.grid[1]} rank(s) per sequence\n"
            f"tokens: {data.batch} x {data.seq_len} a step; of each sequence {per_rank} per rank{documents}\n"
            f"model: {parameters / 1e6:.2f} M parameters, {shape.layers} layers, {shape.heads}:{shape.kv_heads} "
            f"heads of {shape.head_dim}; {precision}\n"
            f"data: {self.corpus.folder}: {megabytes['train']:.1f} MB to train on, "
            f"{megabytes['validation']:.1f} MB held out\n"
            f"start: {f'step {self.begun} of {origin}' if origin else f'from seed {self.chosen.seed}'}"
        )
        self.journal.say(self.cp.explain(*self.attention_inputs()))

    def attention_inputs(self) -> list[Tensor]:
        """q, k, v as attention gets them, without a token: what the choice of a kernel depends on."""
        shape = self.chosen.model
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        return [torch.empty(1, 0, each, shape.head_dim, dtype=dtype, device=self.device) for each in heads]


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps (0: never), and at the end, is to be done now."""
    return every > 0 and (step % every == 0 or step == last)


def over_ranks(value: Tensor) -> Tensor:
    """Sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def open_corpus(chosen: settings.Data, place: Place) -> Corpus:
    """The text; rank 0 goes first, so that others find it prepared where they share its disk.

    Raises:
        ValueError: ranks, on machines of their own, read different text.
    """
    if place.size == 1:
        return Corpus(chosen)
    corpus = Corpus(chosen) if place.rank == 0 else None
    dist.barrier()
    corpus = corpus or Corpus(chosen)
    digests: list[Any] = [None] * place.size
    dist.all_gather_object(digests, corpus.digest)
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise ValueError(
                f"rank {rank} reads other text than rank 0 (digest {digest}, not {digests[0]}) in {corpus.folder}: "
                "give every machine the same data.folder"
            )
    return corpus
