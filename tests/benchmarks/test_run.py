"""The driver of the benchmarks: every module loads, and measured rows take the place of old ones."""

import importlib

import pytest

from benchmarks.run import merged, works


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


def test_rows_that_failed_do_not_take_the_place_of_figures():
    measured = [{"work": "a", "shape": {"F": 1}, "implementation": i, "seconds_median": 1.0} for i in ("x", "y")]
    failed = [measured[0], {"work": "a", "shape": {"F": 1}, "implementation": "y", "error": "killed"}]
    assert merged(measured, failed) == measured
    assert merged(failed, measured) == measured
    assert merged([], failed) == failed
