"""`make demo`: the same training on several ranks and on one, side by side.

    python -m ringattn.launch.demo [key=value ...]

Trains on all GPUs where there are at least two, in bf16, else on two CPU ranks over gloo, in fp32; then once
more from the same seed on one rank. Fails if the loss fell by less than 1 nat or if, in fp32, the two runs'
losses ever differ by 1e-4 or more.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

import torch
from hydra import compose, initialize_config_module

from ringattn import make_plan

from . import gang, metrics, settings
from .plots import draw_comparison, draw_plan
from .report import markdown, some

LEAST_FALL, ALLOWED = 1.0, 1e-4


def main() -> None:
    gpus = torch.cuda.device_count()
    several, preset = (gpus, "demo_gpu") if gpus >= 2 else (2, "demo_cpu")
    if gpus == 1:
        print("One GPU here, and NCCL takes one rank per GPU: both runs use the CPU, over gloo.")
    settings.register()
    with initialize_config_module("ringattn.conf", version_base="1.3"):
        config = compose("train", [f"preset={preset}", *sys.argv[1:]])
    chosen = settings.resolve(config)
    folder = Path("outputs", "demo", f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}").absolute()

    runs: dict[str, dict[int, dict[str, float]]] = {}
    for label, ranks in ((f"{several} ranks", several), ("1 rank", 1)):
        print(f"\n--- {label} ---")
        config.parallel.ranks = ranks
        gang.launch("ringattn.launch.trainer:train", config, folder / label.replace(" ", "-"), ranks)
        runs[label] = metrics.read(folder / label.replace(" ", "-"))
    plan = make_plan(chosen.parallel.layout, chosen.data.seq_len, several, causal=True)
    allowed = ALLOWED if chosen.precision == "fp32" else None
    draw_comparison(runs, folder / "losses.png", allowed)
    draw_plan(plan, folder / "plan.png")

    many, one = runs.values()
    apart = {step: abs(many[step]["loss"] - one[step]["loss"]) for step in many}
    rows = [
        {"step": step, **{label: f"{run[step]['loss']:.6f}" for label, run in runs.items()}, "difference": apart[step]}
        for step in some(many)
    ]
    fall, widest = many[min(many)]["loss"] - many[max(many)]["loss"], max(apart.values())
    print(f"\n{plan}\n\nLoss, nats per byte, from the same seed:\n\n{markdown(rows, list(rows[0]))}\n")
    print(f"fall of the loss: {fall:.2f} nats (at least {LEAST_FALL} wanted)")
    wanted = f"below {allowed:.0e} wanted" if allowed else "no bound"
    print(f"largest difference: {widest:.1e} ({chosen.precision}, {wanted})")
    print(f"plots: {folder / 'losses.png'}\n       {folder / 'plan.png'}")
    if not holds(fall, widest, allowed):
        sys.exit("demo FAILED: see the figures above")


def holds(fall: float, widest: float, allowed: float | None) -> bool:
    """Whether the model learnt and the runs were the same; a NaN is neither."""
    return fall >= LEAST_FALL and (allowed is None or widest < allowed)


if __name__ == "__main__":
    main()
