"""Tile sizes: a table of what was measured, the same on every rank.

A tiling is looked up by pass, GPU family, dtype, head dim (rounded up to a power of two) and number of rows or keys
along the tiles; nothing is tried out at run time, so ranks cannot come to different choices. Print the table:

    python -m ringattn.kernels.tuning

Families without measurements of their own carry tilings that compile without register spills there
(`tests/aot`).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

__all__ = ["PASSES", "TABLE", "Key", "Tiling", "architecture", "tiling_for"]

PASSES = ("forward", "key gradients", "query gradients")
LONG = 4096  # rows (or keys) from which the tiles of long sequences are taken


class Tiling(NamedTuple):
    """How a kernel is cut and compiled. `tma`: blocks are read through tensor descriptors. `registers`: the most that
    a thread may take, so that another program fits beside this one. `keep`: the Hopper forward multiplies queries from
    registers."""

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    registers: int | None = None
    keep: bool = False


class Key(NamedTuple):
    """A row of the table. `dtype` is "half" (bfloat16, float16) or "single"; `length` is "short" or "long"."""

    kernel: str
    family: str
    dtype: str
    head_dim: int
    length: str = "long"


TABLE: dict[Key, Tiling] = {
    Key("forward", "sm_80", "half", 32): Tiling(128, 64, 4, 3),
    Key("forward", "sm_80", "half", 64): Tiling(128, 64, 8, 3),
    Key("forward", "sm_80", "half", 128): Tiling(64, 64, 4, 2),
    Key("forward", "sm_80", "half", 256): Tiling(64, 64, 8, 2),
    Key("key gradients", "sm_80", "half", 32): Tiling(64, 128, 8, 2),
    Key("key gradients", "sm_80", "half", 64): Tiling(64, 128, 8, 2),
    Key("key gradients", "sm_80", "half", 128): Tiling(64, 64, 8, 2),
    Key("key gradients", "sm_80", "half", 256): Tiling(32, 64, 8, 2),
    Key("query gradients", "sm_80", "half", 32): Tiling(128, 64, 8, 2),
    Key("query gradients", "sm_80", "half", 64): Tiling(128, 64, 8, 2),
    Key("query gradients", "sm_80", "half", 128): Tiling(64, 64, 8, 2),
    Key("query gradients", "sm_80", "half", 256): Tiling(64, 64, 8, 2),
    Key("forward", "sm_86", "half", 256): Tiling(64, 32, 8, 2),
    Key("key gradients", "sm_86", "half", 256): Tiling(16, 32, 8, 2),
    Key("query gradients", "sm_86", "half", 256): Tiling(32, 32, 8, 2),
    Key("forward", "sm_90", "half", 32): Tiling(128, 64, 4, 3, tma=True),
    Key("forward", "sm_90", "half", 64): Tiling(128, 128, 8, 2, tma=True, registers=128),
    Key("forward", "sm_90", "half", 64, "short"): Tiling(128, 64, 8, 3, tma=True),
    Key("forward", "sm_90", "half", 128): Tiling(128, 64, 8, 2, tma=True, registers=128),
    Key("forward", "sm_90", "half", 256): Tiling(128, 64, 8, 2, tma=True),
    Key("key gradients", "sm_90", "half", 32): Tiling(64, 128, 8, 2, tma=True),
    Key("key gradients", "sm_90", "half", 64): Tiling(64, 64, 4, 3, tma=True),
    Key("key gradients", "sm_90", "half", 128): Tiling(64, 128, 8, 3, tma=True),
    Key("key gradients", "sm_90", "half", 128, "short"): Tiling(64, 64, 4, 3, tma=True),
    Key("key gradients", "sm_90", "half", 256): Tiling(32, 64, 8, 2, tma=True),
    Key("query gradients", "sm_90", "half", 32): Tiling(128, 64, 8, 2, tma=True),
    Key("query gradients", "sm_90", "half", 64): Tiling(128, 64, 8, 3, tma=True),
    Key("query gradients", "sm_90", "half", 128): Tiling(128, 64, 8, 4, tma=True),
    Key("query gradients", "sm_90", "half", 128, "short"): Tiling(64, 64, 4, 2, tma=True),
    Key("query gradients", "sm_90", "half", 256): Tiling(64, 32, 4, 2, tma=True),
    Key("hopper forward", "sm_90", "half", 64): Tiling(192, 128, 12, 3, tma=True),
    Key("hopper forward", "sm_90", "half", 128): Tiling(128, 128, 8, 3, tma=True, keep=True),
    Key("hopper forward", "sm_90", "half", 256): Tiling(128, 64, 8, 2, tma=True),
    Key("forward", "sm_100", "half", 64): Tiling(128, 128, 8, 3, tma=True),
    Key("forward", "sm_100", "half", 128): Tiling(128, 64, 8, 3, tma=True),
    Key("forward", "sm_100", "half", 256): Tiling(128, 32, 8, 2, tma=True),
    Key("query gradients", "sm_100", "half", 128): Tiling(128, 64, 4, 3, tma=True),
    Key("query gradients", "sm_100", "half", 256): Tiling(64, 32, 8, 2, tma=True),
    # Products in full fp32 do not use matrix units and live in registers: small tiles.
    Key("forward", "sm_80", "single", 32): Tiling(32, 32, 4, 2),
    Key("forward", "sm_80", "single", 64): Tiling(32, 32, 4, 1),
    Key("forward", "sm_80", "single", 128): Tiling(32, 32, 8, 1),
    Key("forward", "sm_80", "single", 256): Tiling(16, 16, 8, 1),
    Key("key gradients", "sm_80", "single", 32): Tiling(32, 32, 4, 1),
    Key("key gradients", "sm_80", "single", 64): Tiling(32, 32, 4, 1),
    Key("key gradients", "sm_80", "single", 128): Tiling(16, 32, 8, 1),
    Key("key gradients", "sm_80", "single", 256): Tiling(16, 16, 8, 1),
    Key("query gradients", "sm_80", "single", 32): Tiling(32, 32, 4, 1),
    Key("query gradients", "sm_80", "single", 64): Tiling(32, 32, 4, 1),
    Key("query gradients", "sm_80", "single", 128): Tiling(32, 16, 8, 1),
    Key("query gradients", "sm_80", "single", 256): Tiling(16, 16, 8, 1),
}

NEXT_FAMILY = {"sm_100": "sm_90", "sm_90": "sm_80", "sm_86": "sm_80", "other": "sm_80"}


@cache
def architecture(device: torch.device) -> str:
    """The family of a GPU: what may be assumed about its matrix units and shared memory."""
    if device.type != "cuda" or torch.version.hip:
        return "other"
    major, minor = torch.cuda.get_device_capability(device)
    return {8: "sm_80" if minor == 0 else "sm_86", 9: "sm_90", 10: "sm_100"}.get(major, "sm_86")


@cache
def tiling_for(kernel: str, family: str, dtype: torch.dtype, head_dim: int, length: int) -> Tiling:
    """The table's tiling, from the nearest family that has one; short sequences fall back on the long ones' tiling.

    Args:
        kernel: one of `PASSES`.
        family: from `architecture`.
        head_dim: the larger of the head dims of q and v.
        length: rows (of a key tile: keys) that tiles are laid along.
    """
    kind = "single" if dtype == torch.float32 else "half"
    width = max(32, 1 << (head_dim - 1).bit_length())
    lengths = ("long",) if length >= LONG else ("short", "long")
    while True:
        for name in lengths:
            tiling = TABLE.get(Key(kernel, family, kind, width, name))
            if tiling is not None:
                return tiling
        family = NEXT_FAMILY[family]


def main() -> None:
    print(f"{'kernel':16} {'family':7} {'dtype':7} {'head dim':>8} {'length':7} rows x keys  warps  stages")
    for key, tiling in TABLE.items():
        extras = (
            " tma" * tiling.tma
            + " keep" * tiling.keep
            + (f" at most {tiling.registers} registers" if tiling.registers else "")
        )
        row = f"{key.kernel:16} {key.family:7} {key.dtype:7} {key.head_dim:8} {key.length:7}"
        print(f"{row} {tiling.rows:4} x {tiling.keys:<4}  {tiling.warps:5}  {tiling.stages:6} {extras}")


if __name__ == "__main__":
    main()
