"""What an attention will take, and so which executor to use: a model of measured rates, the same on every rank.

A launch takes the time of its products at the kernel's rate, and some time to fill and drain the GPU, in a backward as
its longest tile says. What travels takes a fixed time, and its bytes at the rate of the link at that size. Both go on
side by side where an executor hides one behind the other, and nothing is faster than the host issues it:

    ring      max(own, hop) + max(others' 1, hop) + ...     every hop hides, every step merges
    gather    all keys + everything                          nothing hides, nothing merges
    pull      max(own, keys) + others' + a merge             or, in one launch, everything: flags hide the keys,
                                                             and a backward stores gradients where they belong

`python -m ringattn.launch.predict 32768 4` prints the choice for 32768 tokens on each of 4 ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ringattn.executors.axis import slots, span
from ringattn.executors.call import Schedule
from ringattn.executors.pull import remote_axis, slot_of
from ringattn.plan import Plan
from ringattn.rates import HOST, KERNEL_RATES, LAUNCH, MEETING, MEMORY, START, KernelRate, beside, seconds

__all__ = ["Choice", "Prediction", "Workload", "choose_executor", "predict"]

RAGGED = 0.06  # of the longest tile of a backward
TILE, PROCESSORS = 128, 132  # query rows, or keys, that a program works on at a time, and programs
LONGEST = 1.5  # how much longer than the mean the tiles take that come first
ROOM = 132 / 126  # how much longer a forward takes that leaves multiprocessors to messages
COPY = 7e-6  # seconds that each copy of an engine costs, however short
SHORT = 3e-3  # seconds of forward and backward that a host may need longer to issue
ALIKE = 0.003  # predictions that differ by less are as good as each other
MEMORY_SHARE = 0.125  # of a GPU, for keys and gradients of other ranks


class Workload(NamedTuple):
    """Everything of a call that the model looks at."""

    plan: Plan
    kernel: str
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    itemsize: int
    same_node: bool  # ranks reach each other's memory
    waits: bool  # the kernel can wait for keys while it runs
    delivers: bool  # and its backward too, and store the gradients of these keys at home
    memory: int  # bytes of a GPU

    @property
    def rates(self) -> KernelRate:
        return KERNEL_RATES.get(self.kernel, KERNEL_RATES["reference"])

    @property
    def slowest(self) -> str:
        """The link that messages between neighbours take, somewhere."""
        return "p2p" if self.same_node else "network"

    @property
    def token_bytes(self) -> int:
        """Of keys and values."""
        return self.batch * self.kv_heads * (self.head_dim + self.v_head_dim) * self.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Of a token's dk and dv in fp32."""
        return self.token_bytes // self.itemsize * 4

    def compute(self, rank: int, source: int, backward: bool = False) -> float:
        """Seconds of products."""
        pairs = int(self.plan.work[rank, source])
        flops = 2 * (self.head_dim + self.v_head_dim) * self.q_heads * self.batch * pairs
        return flops * 2.5 / self.rates.backward if backward else flops / self.rates.forward

    def launched(self, rank: int, products: float) -> float:
        """Seconds of a launch of the backward: as long as the longest tile takes, or half as long where two programs
        share its heads; and at its end some programs have nothing left to do, for a share of that time."""
        if not products:
            return 0.0
        longest, group = self.longest_tile(rank), self.q_heads // self.kv_heads
        return max(products, longest / (1 if group % 2 else 2)) + START + RAGGED * longest

    def longest_tile(self, rank: int) -> float:
        """Seconds that one program would take for the keys that most rows see."""
        plan = self.plan

        def longest_document() -> int:
            return int(np.diff(plan.mask.bounds(plan.layout.seq_len)).max(initial=0))

        document = plan.derive("longest document", longest_document)
        rows = min(plan.layout.lengths[rank], document, plan.mask.left + plan.mask.right + TILE)
        pairs = TILE * rows * self.q_heads // self.kv_heads
        return 5 * (self.head_dim + self.v_head_dim) * pairs * PROCESSORS / self.rates.backward

    def merge(self, rank: int) -> float:
        """Seconds to write partial results, or dq, and to read them again; and to prepare a backward."""
        return 8 * self.plan.layout.lengths[rank] * self.batch * self.q_heads * self.v_head_dim / MEMORY


class Prediction(NamedTuple):
    """Seconds of the slowest rank, and bytes that an executor keeps for other ranks' keys and gradients."""

    executor: str
    schedule: Schedule
    forward: float
    backward: float
    memory: int

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __str__(self) -> str:
        groups = f"{self.schedule.head_groups} head group{'s' * (self.schedule.head_groups > 1)}"
        ways = {"pull": f"flags, {groups}" if self.schedule.flags else "own keys first", "gather": groups}
        back = "own gradients in halves" if self.schedule.halves else "own gradients last"
        back = "gradients at once" if self.schedule.at_once else back
        way = ways.get(self.executor)
        name = f"{self.executor} ({way}, {back}{', replayed' * self.schedule.replay})" if way else self.executor
        return (
            f"{name}: forward {self.forward * 1e3:.3g} ms, backward {self.backward * 1e3:.3g} ms, "
            f"{self.memory / 2**30:.3g} GiB"
        )


class Choice(NamedTuple):
    """An executor, how it cuts its work, why, and what was weighed."""

    executor: str
    schedule: Schedule
    reason: str
    predictions: tuple[Prediction, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.executor} ({self.reason})", *(f"  {p}" for p in self.predictions)])


def predict(load: Workload) -> Iterator[Prediction]:
    """Every executor that can run this, with the schedules worth trying."""
    yield predict_ring(load)
    for groups in (1, 2, 4, 8):
        if load.kv_heads % groups == 0:
            for halves in (True, False):
                yield predict_gather(load, Schedule(halves=halves, head_groups=groups))
    if load.same_node:
        groups = [n for n in (1, 2, 4, 8) if load.waits and load.kv_heads % n == 0]
        for way in (Schedule(), Schedule(halves=False)):
            yield predict_pull(load, way)
            for n in groups:
                yield predict_pull(load, way._replace(flags=True, head_groups=n))
        for n in groups if load.delivers else ():
            yield predict_pull(load, Schedule(flags=True, at_once=True, head_groups=n))


def predict_ring(load: Workload) -> Prediction:
    plan, ranks = load.plan, range(load.plan.ranks)
    shard = max(plan.layout.lengths)
    link = load.slowest  # what every hop waits for
    narrow = "narrow p2p" if load.same_node else link
    first = seconds(narrow, shard * load.token_bytes)
    hop, home = seconds(link, shard * load.token_bytes), seconds(link, shard * load.gradient_bytes)
    both = seconds(link, shard * (load.token_bytes + load.gradient_bytes))
    onward, back = [], []  # what each rank does at each step
    for rank in ranks:
        steps = [load.compute(rank, (rank - t) % plan.ranks) + LAUNCH for t in ranks]
        merge = load.merge(rank)
        onward.append([beside(step * ROOM, first, narrow) + merge for step in steps[:-1]] + [steps[-1]])
        steps = [load.compute(rank, (rank - t) % plan.ranks, True) + LAUNCH for t in ranks]
        halves = steps[0] / 4, steps[0] * 3 / 4
        middle = [beside(step, both if t > 1 else hop, link) + merge for t, step in enumerate(steps[1:], 1)]
        back.append([beside(halves[0], hop, link), *middle, beside(halves[1], home, link) + merge])
    forward, backward = round_the_ring(onward), round_the_ring(back)
    issued = HOST["call"] + plan.ranks * HOST["launch"] + (plan.ranks - 1) * HOST["message"]
    issued_back = HOST["backward"] + (plan.ranks + 1) * 2 * HOST["launch"] + plan.ranks * HOST["message"]
    memory = 2 * shard * load.token_bytes + 3 * shard * load.gradient_bytes
    return Prediction("ring", Schedule(), max(forward, issued), max(backward, issued_back), memory)


def round_the_ring(steps: list[list[float]]) -> float:
    """When the last rank is done with its steps. The keys of a step come from the rank before, once that has begun its
    step before with them: ranks that do as much in all wait for each other where the long steps of one come early.

    Example:
        >>> round_the_ring([[1, 3], [3, 1]]), round_the_ring([[1, 2, 2], [2, 2, 1], [4, 1, 0]])
        (4.0, 6.0)
    """
    begun = [0.0] * len(steps)
    done = begun
    for each in zip(*steps, strict=True):
        done = [at + taken for at, taken in zip(begun, each, strict=True)]
        begun = [max(own, before) for own, before in zip(done, [begun[-1], *begun[:-1]], strict=True)]
    return max(done)


def predict_gather(load: Workload, schedule: Schedule) -> Prediction:
    """Across nodes keys come through the ports of all GPUs of a node, at NVLink's rate; gradients through one's own."""
    plan, ranks, groups = load.plan, range(load.plan.ranks), schedule.head_groups
    shard, length = max(plan.layout.lengths), slots(plan, 0).length
    travel = seconds("all-gather", (length - shard) * load.token_bytes / groups)
    home = seconds(load.slowest, (length - shard) * load.gradient_bytes)
    forward = backward = 0.0
    for rank in ranks:
        compute = sum(load.compute(rank, source) for source in ranks) / groups + LAUNCH
        forward = max(forward, travel + (groups - 1) * beside(compute, travel, "p2p") + compute)
        own = load.compute(rank, rank, True)
        remote = sum(load.compute(rank, source, True) for source in ranks) - own
        come = seconds("all-gather", (length - shard) * load.token_bytes)
        early = own / 4 if schedule.halves else 0.0
        taken = beside(load.launched(rank, early), come, "p2p") + load.launched(rank, remote)
        taken += beside(load.launched(rank, own - early), home, load.slowest)
        backward = max(backward, taken + (1 + schedule.halves) * load.merge(rank))
        forward += load.merge(rank) / 2 if groups > 1 else 0.0  # results of the groups are put together
    issued = HOST["call"] + groups * (HOST["launch"] + HOST["travel"])
    memory = min(groups, 2) * length * load.token_bytes // groups
    memory = max(memory, length * (load.token_bytes + 2 * load.gradient_bytes))  # the backward takes all heads at once
    issued_back = HOST["backward"] + 6 * HOST["launch"] + 2 * HOST["message"]
    return Prediction("gather", schedule, max(forward, issued), max(backward, issued_back), int(memory))


def predict_pull(load: Workload, schedule: Schedule) -> Prediction:
    plan, ranks = load.plan, range(load.plan.ranks)
    forward = backward = 0.0
    for rank in ranks:
        others = remote_axis(plan, rank).length
        come = seconds("copy engine", others * load.token_bytes)
        first = seconds("copy engine", others * load.token_bytes / schedule.head_groups)
        home = seconds("copy engine", others * load.gradient_bytes)
        own, remote = (sum(load.compute(rank, s) for s in ranks if (s == rank) == mine) for mine in (True, False))
        if schedule.flags:  # the first tiles have their own keys to do while the others' come
            tiles = load.batch * load.q_heads * plan.layout.lengths[rank] / TILE
            stall = max(0.0, first - own * min(1.0, LONGEST * PROCESSORS / max(tiles, 1)))
            taken = MEETING + stall + beside(own + remote + LAUNCH, come, "copy engine")
            taken += 2 * COPY * schedule.head_groups
        else:
            merged = load.merge(rank) if remote else 0.0
            taken = beside(own + LAUNCH, come, "copy engine") + MEETING + remote + LAUNCH + merged
        forward = max(forward, taken)
        own, remote = (sum(load.compute(rank, s, True) for s in ranks if (s == rank) == mine) for mine in (True, False))
        early = own / 4 if schedule.halves else 0.0
        prepared = load.merge(rank)
        late = max(0.0, come - prepared)
        if schedule.at_once:
            taken = beside(load.launched(rank, own + remote), late, "copy engine") + 2 * COPY * schedule.head_groups
        else:
            taken = beside(load.launched(rank, early), late, "copy engine") + load.launched(rank, remote)
            taken += beside(load.launched(rank, own - early), home, "copy engine")
        taken += prepared + 2 * MEETING
        sums = 3 * others * load.gradient_bytes / MEMORY + load.merge(rank)
        backward = max(backward, taken + sums)
    copies = plan.ranks - 1
    issued = HOST["call"] + (2 - schedule.flags) * HOST["launch"] + HOST["travel"]
    issued += 3 * copies * schedule.head_groups * HOST["copy"]
    launches = 1 if schedule.at_once else 2 + schedule.halves
    issued_back = HOST["backward"] + launches * 2 * HOST["launch"] + (2 - schedule.at_once) * HOST["travel"]
    issued_back += copies * (3 * schedule.head_groups if schedule.at_once else 6) * HOST["copy"]
    if forward + backward < SHORT and plan.mask.documents is None:  # documents do not come again
        schedule = schedule._replace(replay=True)
        issued = issued_back = HOST["replay"]
    slot = slot_of(plan) if schedule.flags else None
    longest = max(remote_axis(plan, rank, slot).length for rank in ranks)
    here = 0 if schedule.at_once else longest  # of which gradients lie here before they leave
    most = max(sum(span(plan, rank, s)[1] for rank in ranks if rank != s) for s in ranks)
    memory = 2 * longest * load.token_bytes + (here + most) * load.gradient_bytes
    return Prediction("pull", schedule, max(forward, issued), max(backward, issued_back), memory)


@lru_cache(maxsize=1024)
def choose_executor(name: str, load: Workload) -> Choice:
    """The executor called `name`, or for "auto" the one with the least predicted time of forward and backward that
    keeps to its share of memory. Depends on what all ranks have in common only.

    Raises:
        NotImplementedError: the executor asked for by name cannot run here.
    """
    if load.plan.ranks == 1:
        return Choice("gather", Schedule(), "one rank")
    if name == "pull" and not load.same_node:
        raise NotImplementedError(
            "executor='pull' needs ranks on one node whose GPUs reach each other's memory, and Triton; "
            "use executor='ring' or 'auto'"
        )
    if load.memory == 0:
        return Choice(name if name != "auto" else "ring", Schedule(), "no rates are known for this device")
    budget = int(load.memory * MEMORY_SHARE)
    weighed = sorted(predict(load), key=lambda prediction: prediction.total)
    named = [prediction for prediction in weighed if name in ("auto", prediction.executor)]
    fitting = [prediction for prediction in named if prediction.memory <= budget]
    alike = [prediction for prediction in fitting if prediction.total <= fitting[0].total * (1 + ALIKE)]
    best = min(alike or named, key=lambda prediction: prediction.memory)
    reason = (
        "asked for by name" if name != "auto" else f"least predicted time, and of those within {ALIKE:.1%} least memory"
    )
    if not fitting:
        reason += f", although over the budget of {budget / 2**30:.3g} GiB"
    elif named[0].memory > budget:
        reason += f" within {budget / 2**30:.3g} GiB"
    return Choice(best.executor, best.schedule, reason, tuple(weighed))
