"""Pages say what the records say: the committed ones, and any others."""

import json
from itertools import product
from pathlib import Path

import pytest

from ringattn.launch.benchmarks.publish import PAGES, publish, stale
from ringattn.launch.benchmarks.published import amount, latest, order, read
from ringattn.launch.records import ROOT, append_records
from tests.launch.test_bench import FIELDS

WHERE = {"date": "2026-01-02", "commit": "abc", "dirty": False, "gpu": "GPU X", "torch": "2", "triton": "3", "run": "a"}
CASE = {"batch": 1, "q_heads": 8, "kv_heads": 2, "head_dim": 64, "mask": "causal", "dtype": "bf16"}
TIMED = {"median_ms": 2.0, "tflops_per_gpu": 123.4, "efficiency": 0.5, "synchronised_ms": 3.0, "exposed_ms": 0.25}


def record(bench: str, impl: str, which: str, seq_len: int, **more) -> dict:
    return WHERE | CASE | {"bench": bench, "impl": impl, "pass": which, "seq_len": seq_len, "gpus": 1} | more


def kernels() -> list[dict]:
    entrants = product(("torch-cudnn", "ringattn-triton"), ("forward", "backward"), (2048, 5000))
    return [
        record("kernel", *each, **TIMED | {"tflops_per_gpu": 200.0 + len(each[0]), "efficiency": None})
        for each in entrants
    ]


def foretold(name: str) -> dict:
    clocks = {"clock_mhz": 1250.0 if "auto" in name else None, "one_gpu_clock_mhz": 1500.0}
    return {"executor": "pull", "predicted_ms": 1.5 if "auto" in name else None} | clocks


def scaling() -> list[dict]:
    names = (
        "ringattn-triton-auto-zigzag",
        "ringattn-triton-ring-zigzag",
        "ringattn-triton-ring-striped",
        "ulysses",
        "ring-flash-attn-ring",
    )
    entrants = product(names, ("forward", "forward+backward"), (1024, 4096), (2, 4))
    return [
        record("scaling", name, which, tokens * ranks, ranks=ranks, kernel="cudnn", **TIMED, **foretold(name))
        for name, which, tokens, ranks in entrants
    ]


def memory() -> list[dict]:
    entrants = product(("ringattn-triton-ring-zigzag", "ulysses"), ("forward", "forward+backward"), (1, 2))
    return [
        record("memory", name, which, 1024 * ranks, ranks=ranks, kernel="aten", peak_memory_gib=0.5, efficiency=None)
        for name, which, ranks in entrants
    ]


def precision() -> list[dict]:
    entrants = product(("ringattn-triton-ring-zigzag", "rounded-partials-triton"), ("out", "dq"), (1, 2))
    return [
        record("precision", name, "forward", 1024, ranks=ranks, part=part, error=1e-3) for name, part, ranks in entrants
    ]


def utilization() -> list[dict]:
    shares = ("sm_utilization", "tensor_utilization", "memory_utilization", "l2_hit_rate", "warp_efficiency")
    counted = dict.fromkeys(shares, 0.5) | {"peak_share": 0.2, "peak_tflops": 700.0, "peak_gbs": 4000.0}
    timeline = [[rank, what, 0.0, 10.0] for rank in (0, 1) for what in ("compute", "communication")]
    return [
        *(record("utilization", "ringattn-triton", which, 1024, dram_gib=1.0, **TIMED, **counted) for which in BOTH),
        record("utilization", "torch-fa2", "forward", 1024, **TIMED, **dict.fromkeys(counted), dram_gib=None)
        | {"peak_share": 0.1},
        record("utilization", "ringattn-triton-ring-zigzag", "forward", 1024, ranks=2, timeline=timeline),
    ]


BOTH = ("forward", "backward")


def checks() -> list[dict]:
    told = {"ranks": 2, "layout": "zigzag", "kernel": "triton", "part": "dq", "error": 1e-3, "allowed": 4e-3}
    return [record("check", "", "", 1000, **told, result="pass"), record("check", "", "", 1000, **told, result="FAIL")]


def training() -> list[dict]:
    told = {"ranks": 2, "context": 2, "layout": "zigzag", "kernel": "triton", "steps": 10, "loss": 1.5}
    return [record("train", "", "", 1024, **told, tokens_per_second=12345.6, peak_memory_gib=1.25)]


RECORDS = {
    "kernel": kernels, "scaling": scaling, "memory": memory, "precision": precision, "utilization": utilization,
    "check": checks, "train": training,
}  # fmt: skip
IMAGES = {
    "kernel": ["kernels"], "memory": ["memory"], "precision": ["precision"], "utilization": ["roofline", "timeline"],
    "scaling": [f"scaling-{ranks}-causal-1-8-2-64-bf16" for ranks in (2, 4)],
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the pages, and without any record."""
    (tmp_path / "docs" / "images").mkdir(parents=True)
    for page in PAGES:
        (tmp_path / page).write_text((ROOT / page).read_text())
    return tmp_path


def test_the_pages_are_what_the_committed_records_say():
    assert not stale(), "run: python -m ringattn.launch.report benchmarks"


@pytest.mark.parametrize("bench", ["kernel", "scaling", "memory", "precision", "utilization"])
def test_committed_records_have_the_fields_that_they_should(bench: str):
    path = ROOT / "docs" / "benchmarks" / f"{bench}.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        assert FIELDS - {"min_ms", "max_ms"} <= set(json.loads(line))
        assert not json.loads(line)["dirty"]


def test_executors_kept_to_the_memory_that_they_foretold():
    records = read(ROOT / "docs" / "benchmarks", "memory")
    alone = {(each["impl"], each["pass"]): each["peak_memory_gib"] for each in records if each["ranks"] == 1}
    foretold = [each for each in records if each["predicted_gib"] is not None]
    for each in foretold:
        assert each["peak_memory_gib"] <= alone[each["impl"], each["pass"]] + each["predicted_gib"], each["impl"]
    assert {each["executor"] for each in foretold} == {"ring", "gather", "pull"}


@pytest.mark.parametrize("benches", [[], *([name] for name in RECORDS), list(RECORDS)], ids=" ".join)
def test_any_records_make_pages(root: Path, benches: list[str]):
    for name in benches:
        append_records(root / "docs" / "benchmarks" / f"{name}.jsonl", RECORDS[name]())
    publish(root)
    assert not stale(root)
    text = (root / "docs" / "benchmarks.md").read_text()
    assert text.count("No record yet") == len(RECORDS) + 1 - len(benches) - ("kernel" in benches)
    drawn = {f"{image}.png" for name in benches for image in IMAGES.get(name, [])}
    assert {path.name for path in (root / "docs" / "images").iterdir()} == drawn
    assert all((root / "docs" / "images" / name).stat().st_size > 10_000 for name in drawn)
    assert (root / "README.md").read_text().count("docs/images/kernels.png") == ("kernel" in benches)
    assert ("scaling-4-causal-1-8-2-64-bf16.png" in (root / "README.md").read_text()) == ("scaling" in benches)


def test_what_the_tables_say(root: Path):
    for name, make in RECORDS.items():
        append_records(root / "docs" / "benchmarks" / f"{name}.jsonl", make())
    publish(root)
    lines = [" ".join(line.split()) for line in (root / "docs" / "benchmarks.md").read_text().splitlines()]
    assert "| causal, 5000, 8:2 heads of 64 | **215 (1.02)** | 211 |" in lines
    assert "| ulysses (cudnn) | 123 (50%), 2.00, 0.25 | 123 (50%), 2.00, 0.25 |" in lines
    assert "| ringattn-triton-auto-zigzag | 60%, 1250, 1500 | 60%, 1250, 1500 |" in lines
    assert "| ulysses (aten) | 0.5 | 0.5 |" in lines
    assert "| ringattn-triton-auto-zigzag | 1.50, 2.00 (pull) | 1.50, 2.00 (pull) |" in lines
    assert "| dq, rounded-partials-triton | 1.00e-03 | 1.00e-03 |" in lines
    assert "| ringattn-triton | backward | 123 | 50% | 50% | 50% | 50% | 50% | 20% |" in lines
    assert "| 2 x GPU X | triton | bf16 | 8:2 heads of 64 | 1000 | zigzag | 1 of 2 | 25% of what is allowed |" in lines
    assert "| 2 | 2 | zigzag | triton | bf16 | 1 | 1024 | 10 | 1.5000 | 12,346 | 1.25 |" in lines
    assert "GPU X; torch 2; Triton 3; commit abc; on 2026-01-02." in lines


def test_a_page_that_differs_from_the_records_is_found(root: Path):
    path = root / "docs" / "benchmarks" / "kernel.jsonl"
    append_records(path, kernels())
    publish(root)
    picture = root / "docs" / "images" / "kernels.png"
    picture.rename(picture.with_suffix(".gone"))
    assert stale(root) == ["docs/images/kernels.png"]
    append_records(path, [kernels()[0] | {"run": "b", "tflops_per_gpu": 321.0}])
    publish(root)
    page = root / "docs" / "benchmarks.md"
    page.write_text(page.read_text().replace("321", "322"))
    assert stale(root) == ["docs/benchmarks.md"]
    append_records(path, [kernels()[0] | {"run": "c", "median_ms": 9.0}])
    assert stale(root) == ["README.md", "docs/benchmarks.md"]  # the picture's, too


def test_the_last_run_of_a_case_counts_and_no_run_is_mixed_with_it():
    old = [record("kernel", name, "forward", 512, **TIMED) for name in ("fa4", "torch-fa2")]
    new = [record("kernel", "fa4", "forward", 512, **TIMED) | {"run": "b"}]
    other = [record("kernel", "fa4", "forward", 1024, **TIMED)]
    assert latest(old + other + new) == other + new


def test_cases_of_kernels_stand_in_order_whatever_ran_last(root: Path):
    path = root / "docs" / "benchmarks" / "kernel.jsonl"
    cases = [("none", 128, 512), ("causal", 64, 512), ("causal", 128, 8192), ("causal", 128, 2048)]
    made = [record("kernel", "fa4", "forward", s, **TIMED) | {"mask": m, "head_dim": d} for m, d, s in cases]
    append_records(path, made)
    assert [(each["mask"], each["head_dim"], each["seq_len"]) for each in read(path.parent, "kernel")] == [
        ("causal", 128, 2048),
        ("causal", 128, 8192),
        ("causal", 64, 512),
        ("none", 128, 512),
    ]


def test_ours_come_first_and_peers_in_a_fixed_order():
    assert order(["fa4", "ringattn-b", "new", "torch-fa2", "ringattn-a", "fa4"]) == [
        *("ringattn-b", "ringattn-a", "torch-fa2", "fa4", "new")
    ]
    assert [amount(tokens) for tokens in (1024, 1025, 131072)] == ["1k", "1025", "128k"]
