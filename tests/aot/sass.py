"""What can be read off Hopper's machine code about its matrix instructions, which run while the warp goes on.

An HGMMA may read its left operand from registers, and the results come later: the group that it belongs to is complete
after WARPGROUP.DEPBAR.LE gsb0, n once no more than n younger groups exist. `gsb0` on an HGMMA closes a group.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

__all__ = ["maxima_before_the_branch", "overwritten_operands"]

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([^;]*);", re.MULTILINE)
LINE = re.compile(r"^(?P<label>\.L_x_\d+):|^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(?P<text>[^;]*);", re.MULTILINE)
LEFT_OPERAND = re.compile(r"HGMMA\S* R\d+, R(\d+)\S*, gdesc")
OUTSTANDING = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)")
DESTINATION = re.compile(r"(\S+) (?:P\w+, )?R(\d+)\b")
BACK = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
WRITE_NO_REGISTER = re.compile(
    r"(ST|STG|STS|STL|STSM|RED|REDG|BAR|BRA|BSSY|BSYNC|EXIT|SYNCS|WARPGROUP|UTMA|FENCE|MEMBAR|ISETP|FSETP|PLOP3|R2UR|HGMMA|NANOSLEEP)\b"
)
LEFT_REGISTERS = 4  # of 64 x 16 numbers of 16 bits, in each of 128 threads


def overwritten_operands(code: str) -> list[str]:
    """Instructions that write a register which a running HGMMA still reads.

    ptxas before CUDA 13.3 is known to emit them. Branches are not followed.
    """
    groups: list[set[int]] = [set()]  # registers read by complete groups, oldest first, and by the one being filled
    found = []
    for text in INSTRUCTION.findall(code):
        if operand := LEFT_OPERAND.match(text):
            groups[-1] |= registers(int(operand[1]), LEFT_REGISTERS)
        if text.startswith("HGMMA") and "gsb0" in text:
            groups.append(set())
        elif wait := OUTSTANDING.match(text):
            groups = groups[max(len(groups) - 1 - int(wait[1], 16), 0) :]
        elif (target := DESTINATION.match(text)) and not WRITE_NO_REGISTER.match(text):
            width = next(
                (n for mark, n in ((".128", 4), (".64", 2), (".WIDE", 2), ("LDSM", 4)) if mark in target[1]), 1
            )
            if registers(int(target[2]), width) & set().union(*groups):
                found.append(text)
    return found


def maxima_before_the_branch(code: str) -> int:
    """Maxima that are taken, in any innermost loop with products, after the last wait for a product and before the
    branch that follows."""
    found = 0
    for loop in innermost_loops(code):
        waits = [i for i, text in enumerate(loop) if OUTSTANDING.match(text)]
        for text in itertools.takewhile(lambda text: not text.startswith("BRA"), loop[waits[-1] :] if waits else []):
            found += text.startswith("FMNMX")
    return found


def innermost_loops(code: str) -> Iterator[list[str]]:
    """The instructions of each loop that has no other inside."""
    body: list[str] = []
    labels: dict[str, int] = {}
    jumped = 0  # where the last jump back was
    for line in LINE.finditer(code):
        if line["label"]:
            labels[line["label"]] = len(body)
            continue
        body.append(line["text"])
        back = BACK.match(line["text"])
        if back and back[1] in labels:
            if labels[back[1]] >= jumped:
                yield body[labels[back[1]] :]
            jumped = len(body)


def registers(first: int, count: int) -> set[int]:
    return set(range(first, first + count))
