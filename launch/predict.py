"""What the cost model says, without a GPU: which executor, why, and what each of them would take.

python -m ringattn.launch.predict 32768 4      32768 tokens on each of 4 ranks of one node
"""

from __future__ import annotations

import argparse

from ringattn.cost import Workload, choose_executor
from ringattn.plan import make_plan
from ringattn.rates import KERNEL_RATES

__all__ = ["main"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=int, help="on each rank")
    parser.add_argument("ranks", type=int)
    parser.add_argument("--kernel", default="triton", choices=KERNEL_RATES)
    parser.add_argument("--layout", default="zigzag")
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("Q", "KV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--across-nodes", action="store_true")
    chosen = parser.parse_args()
    plan = make_plan(chosen.layout, chosen.tokens * chosen.ranks, chosen.ranks, causal=True)
    q_heads, kv_heads = chosen.heads
    load = Workload(
        plan=plan,
        kernel=chosen.kernel,
        batch=1,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=chosen.head_dim,
        v_head_dim=chosen.head_dim,
        itemsize=2,
        same_node=not chosen.across_nodes,
        waits=chosen.kernel == "hopper",
        memory=141 * 10**9,
    )
    print(choose_executor("auto", load))


if __name__ == "__main__":
    main()
