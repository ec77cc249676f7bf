"""The check passes where attention is right, fails where it is not, and says so by its exit status and its records."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.functional import scaled_dot_product_attention

from ringattn.launch import check
from ringattn.launch.gang import Place
from ringattn.launch.oracle import Case, Result, attend_across_ranks, exact, make_inputs
from ringattn.launch.records import read_records

ALONE = Place(0, 1, torch.device("cpu"), "for a test")
SMALL = {"seq_len": 33, "q_heads": 2, "kv_heads": 1, "head_dim": 8, "layouts": ["zigzag"], "dtypes": ["fp32"]}


def run_alone(**options) -> dict:
    return check.check(OmegaConf.create(SMALL | options), Path(), ALONE)


def test_two_ranks_pass_and_leave_records(tmp_path):
    """From the command line, over gloo."""
    small = [f"{key}={value}".replace("'", "").replace(" ", "") for key, value in SMALL.items()]
    command = [sys.executable, "-m", "ringattn.launch.check", "parallel.device=cpu", "parallel.ranks=2", *small]
    done = subprocess.run(
        [*command, f"record={tmp_path}/check.jsonl", f"hydra.run.dir={tmp_path}"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "16 passed, 0 failed" in done.stdout
    records = read_records(tmp_path / "check.jsonl")
    assert [record["part"] for record in records] == ["forward", "dq", "dk", "dv"] * 4
    for record in records:
        assert record["bench"] == "check"
        assert record["ranks"] == 2
        assert 0 < record["error"] <= record["allowed"]
    assert len({record["run"] for record in records}) == 1


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("damage", [lambda x: x * 1.001, lambda x: x.roll(1, 1), lambda x: x * torch.nan])
def test_a_wrong_result_fails(monkeypatch, capsys, part, damage):
    def broken(*arguments):
        right = attend_across_ranks(*arguments)
        return Result(*(damage(x) if number == part else x for number, x in enumerate(right)))

    monkeypatch.setattr(check, "attend_across_ranks", broken)
    assert run_alone(masks=["causal"]) == {"failed": 1}
    assert "3 passed, 1 failed" in capsys.readouterr().out


def test_the_command_exits_with_1_when_a_comparison_fails(monkeypatch):
    monkeypatch.setattr(check.entry, "run", lambda *_: {"failed": 1})
    with pytest.raises(SystemExit) as left:
        check.task.__wrapped__(OmegaConf.create())
    assert left.value.code == 1


def test_wrong_shapes_and_names_are_refused():
    with pytest.raises(ValueError, match="kv_heads=3: expected a divisor of q_heads=8"):
        check.Check(kv_heads=3)
    with pytest.raises(ValueError, match="layouts=zigzig: expected one of contiguous, zigzag, striped"):
        check.Check(layouts=["zigzig"])
    with pytest.raises(ValueError, match="masks=sliding: expected one of causal, none, window, packed"):
        check.Check(masks=["sliding"])


def test_the_oracle_is_softmax_attention():
    """Against torch's own, in fp64, so that the measure itself is measured."""
    case = Case(21, 2, 4, 2, 8)
    q, k, v, dout = (x.requires_grad_() for x in make_inputs(case, 0))
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True).transpose(1, 2)
    grads = torch.autograd.grad(out, (q, k, v), dout.detach())
    with torch.no_grad():
        right = exact(case, make_inputs(case, 0))
    torch.testing.assert_close(tuple(right), (out.detach(), *grads), rtol=1e-12, atol=1e-12)
