"""What runs write, and what reports and pictures make of it."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ringattn import make_plan
from ringattn.launch import metrics, report
from ringattn.launch.plots import colors, draw_comparison, draw_plan, shade
from ringattn.launch.results import append_row, read_rows

pytestmark = pytest.mark.timeout(60)


def write_run(folder: Path, steps: range, loss: float, rank: int = 0, tensorboard: bool = False) -> None:
    journal = metrics.Journal(folder, rank, 10, tensorboard)
    for step in steps:
        journal.write(step, loss=loss / step, tokens_per_second=1000.0)
    journal.say("done")
    journal.close()


def test_records_are_json_lines_and_the_last_word_counts(tmp_path: Path):
    write_run(tmp_path, range(1, 6), 1.0)
    write_run(tmp_path, range(4, 8), 2.0)  # resumed from step 3
    records = metrics.read(tmp_path)
    assert list(records) == [1, 2, 3, 4, 5, 6, 7]
    assert [records[step]["loss"] for step in (3, 4, 7)] == [1 / 3, 2 / 4, 2 / 7]
    assert len([json.loads(line) for line in (tmp_path / metrics.METRICS).open()]) == 9
    assert "step 7/10  loss 0.2857" in (tmp_path / metrics.LOG).read_text()


def test_a_cut_off_line_is_no_obstacle(tmp_path: Path):
    write_run(tmp_path, range(1, 4), 1.0)
    path = tmp_path / metrics.METRICS
    path.write_text(path.read_text()[:-9])
    assert list(metrics.read(tmp_path)) == [1, 2]
    write_run(tmp_path, range(3, 5), 1.0)
    assert list(metrics.read(tmp_path)) == [1, 2, 3, 4]


def test_only_rank_0_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_run(tmp_path / "silent", range(1, 3), 1.0, rank=1, tensorboard=True)
    assert not (tmp_path / "silent").exists()
    assert capsys.readouterr().out == ""
    write_run(tmp_path / "loud", range(1, 3), 1.0, tensorboard=True)
    assert "done" in capsys.readouterr().out
    assert list((tmp_path / "loud" / "tensorboard").glob("events.out.tfevents.*"))


def test_rows_may_bring_columns_and_come_at_once(tmp_path: Path):
    table = tmp_path / "results.csv"
    append_row(table, {"job": 0, "error": "a, b\nc"})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job: append_row(table, {"job": job, "loss": 0.5}), range(1, 20)))
    rows = read_rows(table)
    assert sorted(int(row["job"]) for row in rows) == list(range(20))
    assert rows[0] == {"job": "0", "error": "a, b\nc", "loss": ""}
    with table.open(newline="") as file:
        assert next(csv.reader(file)) == ["job", "error", "loss"]


def test_report_of_a_run(tmp_path: Path):
    write_run(tmp_path, range(1, 41), 8.0)
    lines = report.report_run(tmp_path).splitlines()
    assert lines[0].split() == ["|", "step", "|", "loss", "|", "tokens_per_second", "|"]
    assert lines[2].split()[1:4] == ["1", "|", "8"]
    assert lines[-1].split()[1:4] == ["40", "|", "0.2"]
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 14
    assert (tmp_path / report.PLOT).stat().st_size > 10_000


def test_comparison_is_drawn(tmp_path: Path):
    write_run(tmp_path, range(1, 6), 1.0)
    records = metrics.read(tmp_path)
    draw_comparison({"2 ranks": records, "1 rank": records}, tmp_path / "both.png", 1e-4)
    assert (tmp_path / "both.png").stat().st_size > 10_000


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("seq_len", "size"), [(30, 768), (30, 7)])
def test_the_picture_of_a_plan_is_its_mask(layout: str, seq_len: int, size: int):
    plan = make_plan(layout, seq_len, 3, causal=True)
    palette = np.array(colors(3))
    image, own, other = shade(plan, palette, size)
    holder = np.empty(seq_len, int)
    for rank in range(3):
        holder[plan.layout.positions(rank).numpy()] = rank
    tokens = np.arange(len(image)) * seq_len // len(image)
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            color = palette[holder[query]]
            paler = color if holder[query] == holder[key] else 1 - 0.45 * (1 - color)
            np.testing.assert_allclose(image[i, j], paler if key <= query else np.ones(3))
    assert [a + b for a, b in zip(own, other, strict=True)] == [plan.pairs(rank) for rank in range(3)]


@pytest.mark.parametrize("ranks", [1, 3, 20])
def test_plans_are_drawn(tmp_path: Path, ranks: int):
    draw_plan(make_plan("zigzag", 1000, ranks, causal=True), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000
