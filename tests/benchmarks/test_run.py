"""The driver of the benchmarks: every module loads, and measured rows take the place of old ones."""

import importlib
import sys
from pathlib import Path

import pytest

from benchmarks.run import Side, merged, works
from benchmarks.table import write_tables


@pytest.mark.parametrize(
    "name", ["ours", "parts", "prepare", "replacement_memory", "replacement_widths", "run", "table", "whole", "worker"]
)
def test_every_module_of_our_side_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")


def test_new_rows_take_the_place_of_those_of_the_same_work_and_shape():
    old = [{"work": work, "shape": {"F": f}, "implementation": i, "date": "old"}
           for work in ("a", "b") for f in (1, 2) for i in ("x", "y")]  # fmt: skip
    new = [{"work": "a", "shape": {"F": 2}, "implementation": "z", "date": "new"},
           {"work": "c", "shape": {"F": 2}, "implementation": "z", "date": "new"}]  # fmt: skip
    found = merged(old, new)
    assert [(r["work"], r["shape"]["F"], r["implementation"]) for r in found] == [
        ("a", 1, "x"), ("a", 1, "y"), ("a", 2, "z"), ("b", 1, "x"), ("b", 1, "y"), ("b", 2, "x"), ("b", 2, "y"),
        ("c", 2, "z"),
    ]  # fmt: skip


def test_every_work_begins_with_ours_and_names_a_side():
    for work in works():
        assert work.implementations[0].startswith("ours:")
        assert all(name.split(":")[0] in ("ours", "peers") for name in work.implementations)


def test_rows_of_which_more_failed_do_not_take_the_place_of_others():
    measured = [{"work": "a", "shape": {"F": 1}, "implementation": i, "seconds_median": 1.0} for i in ("x", "y")]
    half = [measured[0], {"work": "a", "shape": {"F": 1}, "implementation": "y", "error": "killed"}]
    none = [row | {"error": "killed"} for row in half]
    assert merged(measured, half) == measured
    assert merged(half, none) == half
    assert merged(half, measured) == measured
    assert merged([], none) == none


def test_a_worker_that_ended_is_told_and_another_takes_its_place(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.run.HOME", tmp_path)
    side = Side("ours", Path(sys.executable))
    side.process.kill()
    side.process.wait()
    assert "the worker ended" in side.ask(do="forget")["error"]
    assert side.ask(do="forget") == {}
    side.process.kill()


def test_tables_are_written_of_rows_old_and_new(tmp_path):
    row = {"work": "a", "implementation": "x", "shape": {}, "seconds_median": 1.0, "peak_bytes": None,
           "ratio_to_encoder_product": None, "ratio_to_ours": None, "pairs": 1, "date": "2026-01-01"}  # fmt: skip
    write_tables(tmp_path, [row, row | {"date": "2026-01-02", "machine": {"cores": 2}}], "2026-01-02")
    assert "cores 2 (2026-01-02)" in (tmp_path / "2026-01-02.md").read_text()
