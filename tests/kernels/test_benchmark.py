"""The runner of the kernel benchmarks: what was measured is kept, and not measured again."""

from __future__ import annotations

import json

import pytest

from benchmarks import kernels, kernels_report
from benchmarks.kernels_report import Case, Results


def case(name: str, measured: list, **row) -> Case:
    def measure() -> dict:
        measured.append(name)
        return {"ms": 1.23456, "rel_error": 1e-3, **row}

    return Case(name, "2x64x128", "equal", 64, measure)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kernels.json"


def open_results(path, sources="a", again=False) -> Results:
    return Results(path, {"device": "some GPU", "sources": sources}, again)


def test_rows_are_on_disk_as_soon_as_they_are_measured(path):
    results, measured = open_results(path), []
    results.add(case("one", measured).run())
    whole = json.loads(path.read_text())
    assert whole["device"] == "some GPU"
    assert whole["rows"] == [
        {
            "kernel": "one", "shape": "2x64x128", "counts": "equal", "chunk": 64,
            "ms": 1.235, "rel_error": 0.001, "sources": "a",
        }
    ]  # fmt: skip


def test_a_second_run_measures_what_is_lacking_or_of_other_kernels(path):
    measured = []
    cases = [case("one", measured), case("two", measured)]
    assert kernels.measure(cases[:1], open_results(path), 60)
    assert kernels.measure(cases, open_results(path), 60)
    assert measured == ["one", "two"]
    assert kernels.measure(cases, open_results(path, again=True), 60)
    assert measured == ["one", "two"] * 2
    assert kernels.measure(cases[:1], open_results(path, sources="b"), 60)
    assert measured == ["one", "two"] * 2 + ["one"]
    assert [row["sources"] for row in json.loads(path.read_text())["rows"]] == ["b", "a"]


def test_the_budget_ends_a_run_and_a_failure_does_not(path):
    measured = []

    def fail():
        raise RuntimeError("no memory")

    cases = [Case("bad", "", "", 0, fail), case("good", measured), case("wrong", measured, rel_error=float("nan"))]
    assert not kernels.measure(cases, open_results(path), 60)
    assert measured == ["good", "wrong"]
    assert not any(row["kernel"] == "bad" for row in json.loads(path.read_text())["rows"])
    assert kernels.measure([case("late", measured)], open_results(path), -1.0)
    assert "late" not in measured


def test_every_row_of_the_table_has_a_case():
    pytest.importorskip("triton")
    cases = {name: [case.key for case in group()] for name, group in kernels.groups().items()}
    assert {counts for *_, counts, _ in cases["long"]} == {"equal", "varying", "selected"}
    assert all(len(keys) == len(set(keys)) for keys in cases.values())
    tokens = " ".join(shape for keys in cases.values() for _, shape, _, _ in keys)
    for size in ("24x4608x128", "24x32768x128", "24x65536x128", "40x75600x128", "24x119056x128", "32768x3072x12288"):
        assert size in tokens


ROW = dict(kernel="k", shape="s", counts="equal", chunk=64, ms=1.0, tflops=9.0, peak_temp_bytes=1_500_000)
DELTA = dict(**ROW, ratio=3.0, ideal_ratio=4.0)
REFRESH = dict(**ROW, ratio=0.8, ideal_ratio=1.0, cost=1.25)
WHOLE = {"device": "some GPU", "rows": [DELTA, REFRESH, {"kernel": "copy", "shape": "4 GiB", "ms": 2.0}]}


def test_the_table_holds_what_is_compared_with_dense():
    assert kernels_report.markdown(WHOLE).splitlines()[2:] == [
        "| k | s | equal | 64 | 1 | 9 | 3.00x | 4.0x | 1.5 |",
        "| k | s | equal | 64 | 1 | 9 | costs 1.25x | 1.0x | 1.5 |",
    ]


def test_the_plot(path):
    pytest.importorskip("matplotlib")
    kernels_report.plot(WHOLE, path.with_suffix(".svg"))
    assert path.with_suffix(".svg").stat().st_size > 1000
