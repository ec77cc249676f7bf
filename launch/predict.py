"""What the cost model says, without a GPU: which executor, why, and what each of them would take.

python -m ringattn.launch.predict 32768 4      32768 tokens on each of 4 ranks of one node
"""

from __future__ import annotations

import argparse

from ringattn.cost import Workload, choose_executor
from ringattn.kernels.hopper import SOURCES
from ringattn.plan import make_plan
from ringattn.rates import KERNEL_RATES, LAUNCH

__all__ = ["dense", "efficiencies", "main"]

H200 = 141 * 10**9  # bytes


def dense(
    tokens: int,
    ranks: int,
    *,
    kernel: str = "hopper",
    layout: str = "zigzag",
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    same_node: bool = True,
) -> Workload:
    """Causal attention of one sequence, with so many tokens on each rank, in 16 bits on H200s."""
    return Workload(
        plan=make_plan(layout, tokens * ranks, ranks, causal=True),
        kernel=kernel,
        batch=1,
        q_heads=heads[0],
        kv_heads=heads[1],
        head_dim=head_dim,
        v_head_dim=head_dim,
        itemsize=2,
        same_node=same_node,
        waits=kernel == "hopper",
        delivers=kernel == "hopper" and ranks - 1 <= SOURCES,
        memory=H200,
    )


def efficiencies(load: Workload, forward: float, backward: float) -> tuple[float, float]:
    """Strong-scaling efficiency, forward and of both passes, if these take so many seconds: one GPU's time for all of
    the sequence over P times this one."""
    ranks = range(load.plan.ranks)
    once, again = (sum(load.compute(r, s, back) for r in ranks for s in ranks) + LAUNCH for back in (False, True))
    return once / (load.plan.ranks * forward), (once + again) / (load.plan.ranks * (forward + backward))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=int, help="on each rank")
    parser.add_argument("ranks", type=int)
    parser.add_argument("--kernel", default="hopper", choices=KERNEL_RATES)
    parser.add_argument("--layout", default="zigzag")
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("Q", "KV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--across-nodes", action="store_true")
    given = vars(parser.parse_args())
    given["same_node"] = not given.pop("across_nodes")
    print(choose_executor("auto", dense(given.pop("tokens"), given.pop("ranks"), **given)))


if __name__ == "__main__":
    main()
