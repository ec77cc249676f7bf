"""The kernel that waits for other ranks compiles for every architecture, with loads that other GPUs' writes reach."""

import re

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ringattn.transport.await_kernel import await_kernel

SIGNATURE = {"p_words": "*i32", "p_error": "*i64", "count": "i32", "patience": "i64", "me": "i32", "RANKS": "constexpr"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles(capability, ranks):
    source = ASTSource(await_kernel, signature=SIGNATURE, constexprs={"RANKS": ranks})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
    looks = re.findall(r"(?:ld|atom)\.global\S*acquire", compiled.asm["ptx"])
    assert looks
    assert all(".sys" in look for look in looks)
    assert "globaltimer" in compiled.asm["ptx"]
