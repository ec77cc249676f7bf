"""Plans on paper: the page says what the planner does, and the command prints and draws any plan."""

import subprocess
import sys

import numpy as np
import pytest

from ringattn import make_plan
from ringattn.launch import planned
from ringattn.launch.packing import LENGTHS, packed
from ringattn.launch.report import main


def test_the_page_on_balance_is_up_to_date():
    assert not planned.renew(write=False), "renew it: python -m ringattn.launch.report balance"


def test_the_page_is_renewed(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / planned.PAGE).write_text("before\n<!-- balance -->\nold\n<!-- end -->\nafter\n")
    assert planned.renew(tmp_path)
    text = (tmp_path / planned.PAGE).read_text()
    assert text.startswith("before\n<!-- balance -->\n| lengths")
    assert text.endswith("<!-- end -->\nafter\n")
    assert not planned.renew(tmp_path)


def test_the_command_prints_and_draws_a_plan(tmp_path):
    picture = tmp_path / "folder" / "plan.png"
    words = ["--tokens", "4000", "--ranks", "3", "--documents", "web", "--window", "50", "--picture", str(picture)]
    done = subprocess.run(
        [sys.executable, "-m", "ringattn.launch.report", "plan", *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "4000 tokens on 3 ranks, layout balanced, mask causal, window 50," in done.stdout
    assert "planned in" in done.stdout
    assert "| to rank | from 0 | from 1 | from 2 |" in done.stdout
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
def test_documents_of_ones_own(layout, tmp_path, capsys, monkeypatch):
    words = ["--tokens", "40", "--ranks", "2", "--cu-seqlens", "0,7,40", "--picture", str(tmp_path / "plan.png")]
    monkeypatch.setattr(sys, "argv", ["report", "plan", "--layout", layout, *words])
    main()
    assert str(make_plan(layout, 40, 2, causal=True, cu_seqlens=[0, 7, 40])) in capsys.readouterr().out


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_fill_the_sequence(name):
    for total in (1, 100, 4097, 1 << 17):
        cu_seqlens = packed(name, total, seed=3)
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == total
        assert (np.diff(cu_seqlens) > 0).all()


def test_log_normal_lengths_are_as_long_as_they_should():
    lengths = np.diff(packed("log-normal", 1 << 24))
    assert lengths.max() == 32768
    assert 3700 < lengths.mean() < 4200  # 4096, less the tail that is cut
