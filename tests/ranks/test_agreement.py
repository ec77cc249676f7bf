"""Ranks that disagree all raise, within seconds, and say who differs in what."""

import inspect
import re
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn import preparation, ranks
from tests.gang import run_ranks


def tensors(tokens=4, q_heads=4, kv_heads=2, head_dim=8, v_head_dim=8, batch=1, dtype=torch.float32):
    shapes = [(q_heads, head_dim), (kv_heads, head_dim), (kv_heads, v_head_dim)]
    return [torch.zeros(batch, tokens, heads, dim, dtype=dtype) for heads, dim in shapes]


TENSOR_FIELDS = tuple(inspect.signature(tensors).parameters)
DISAGREEMENTS = [
    ({"version": "9.9"}, "version is '0.1.0' on rank 0, 2 and '9.9' on rank 1; install the same ringattn"),
    ({"layout": "striped"}, "layout is 'zigzag' on rank 0, 2 and 'striped' on rank 1; make layout the same"),
    ({"seq_len": 13}, "seq_len is 12 on rank 0, 2 and 13 on rank 1; the shards hold 12 tokens in all"),
    ({"tokens": 5}, "seq_len is 12 on rank 0, 2 and 15 on rank 1; the shards hold 13 tokens .* pass seq_len=13"),
    ({"causal": False}, "causal is True on rank 0, 2 and False on rank 1"),
    (
        {"window_size": 3},
        r"window_size is '\(-1, 0\)' on rank 0, 2 and '\(2, 0\)' on rank 1; make window_size the same",
    ),
    ({"cu_seqlens": [0, 9]}, "cu_seqlens is 'None' on rank 0, 2 and '1 document of 9 tokens in all, .*' on rank 1"),
    ({"balance": ringattn.Mask()}, "balance is 'causal' on rank 0, 2 and 'none' on rank 1"),
    ({"softcap": 5.0}, "softcap is 0.0 on rank 0, 2 and 5.0 on rank 1"),
    ({"sinks": torch.zeros(4)}, "sinks is 'none' on rank 0, 2 and 'torch.float32' on rank 1"),
    ({"batch": 2}, "batch is 1 on rank 0, 2 and 2 on rank 1"),
    ({"q_heads": 8}, "q_heads is 4 on rank 0, 2 and 8 on rank 1"),
    ({"kv_heads": 1}, "kv_heads is 2 on rank 0, 2 and 1 on rank 1"),
    ({"head_dim": 16}, "head_dim is 8 on rank 0, 2 and 16 on rank 1"),
    ({"v_head_dim": 16}, "v_head_dim is 8 on rank 0, 2 and 16 on rank 1"),
    ({"dtype": torch.float64}, "dtype is 'torch.float32' on rank 0, 2 and 'torch.float64' on rank 1"),
    ({"softmax_scale": 0.5}, "softmax_scale is 0.3 on rank 0, 2 and 0.5 on rank 1"),
    ({"deterministic": True}, "deterministic is False on rank 0, 2 and True on rank 1"),
    ({"kernel": "aten"}, "kernel is 'reference' on rank 0, 2 and 'aten' on rank 1"),
]
REFUSALS = [
    ({"kv_heads": 3}, "ValueError: got q .*; k and v must have equally many heads, and q a multiple of them"),
    ({"dtype": torch.int32}, "TypeError: got torch.int32; cast q, k and v to one of"),
    ({"layout": "zigzig"}, "ValueError: got layout='zigzig'; choose one of contiguous, zigzag, striped"),
    ({"cu_seqlens": [0, 13]}, "ValueError: got cu_seqlens up to 13 for a sequence of 12 tokens"),
    ({"cu_seqlens": [0, 3, 2]}, r"ValueError: got cu_seqlens=\[0, 3, 2\]; it must begin with 0 and never fall"),
    ({"sinks": torch.zeros(3)}, r"ValueError: got sinks \(3,\) of torch.float32 for 4 query heads"),
    ({"kernel": "cudnn"}, "NotImplementedError: kernel='cudnn' cannot take these inputs: cuDNN runs on CUDA"),
]


def call(rank: int, changed: dict) -> str:
    """Rank 1 calls with something else than the others; what each rank was told."""
    mine = {"kernel": "reference", "causal": True, "softmax_scale": 0.3} | (changed if rank == 1 else {})
    preparation.__version__ = mine.pop("version", preparation.__version__)
    inputs = tensors(**{name: mine.pop(name) for name in TENSOR_FIELDS if name in mine})
    start = time.monotonic()
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        ringattn.ring_attention(*inputs, **mine)
    assert time.monotonic() - start < 5
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("changed", "message"), DISAGREEMENTS, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_every_rank_names_rank_field_values_and_fix(changed, message):
    for said in run_ranks(3, call, changed):
        assert re.search("RankDisagreement: nothing was computed, ranks disagree: " + message, said), said


@pytest.mark.parametrize(("changed", "message"), REFUSALS, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_a_refusal_on_one_rank_is_told_on_all(changed, message):
    for rank, said in enumerate(run_ranks(3, call, changed)):
        prefix = "" if rank == 1 else "RankDisagreement: nothing was computed, rank 1 refused its inputs: "
        assert re.match(prefix + message, said), said


def late_disagreement(rank: int) -> str:
    """All ranks agreed on a shape; then one of them comes with another, while the others go ahead."""
    everyone = ranks.ranks_named(ranks.group_name(None))
    assert everyone.transport is not None
    everyone.deadline = everyone.transport.deadline = timedelta(seconds=2)
    cp = ringattn.ContextParallel()
    cp.attention(*tensors())
    with pytest.raises((ringattn.RankDisagreement, ringattn.TransportError)) as caught:
        cp.attention(*tensors(batch=2 if rank == 1 else 1))
    return str(caught.value)


def test_a_disagreement_after_the_first_call_raises_on_every_rank():
    said = run_ranks(3, late_disagreement, timeout=30)
    assert "configuration that all ranks agreed on before" in said[1]
    assert "rank 0 was not done with sends to ranks [1], receives from [2]" in said[0]


def shards_that_do_not_fit(rank: int) -> None:
    cp = ringattn.ContextParallel(layout="contiguous")
    with pytest.raises(ValueError, match=r"got shards of \(4, 4\) tokens; .* has \(5, 4\): cut the sequence with"):
        cp.attention(*tensors(), seq_len=9)


def test_shards_must_be_the_layouts():
    run_ranks(2, shards_that_do_not_fit)


def meet_again(rank: int, folder: str) -> None:
    """A group is destroyed and made anew under the same name: what the old one agreed on says nothing."""
    for meeting in ("first", "second", "third"):
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{folder}/{meeting}", rank=rank, world_size=2)
        ringattn.ring_attention(*tensors(), causal=True)
        with pytest.raises(ringattn.RankDisagreement, match="causal is True on rank 0 and False on rank 1"):
            ringattn.ring_attention(*tensors(batch=2), causal=rank == 0)


def test_groups_made_again_agree_anew(tmp_path):
    run_ranks(2, meet_again, str(tmp_path))
