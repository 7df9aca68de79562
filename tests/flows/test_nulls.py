import json
from dataclasses import replace
from pathlib import Path

import pytest

from crosshead.activations.cache import ActivationCache
from crosshead.analysis.frontiers import null_record
from crosshead.analysis.one_head import SEED_OFFSET
from crosshead.io.files import write_json
from flows import null_target as target
from flows import nulls as flow
from flows._runtime import Stage
from tests.activations.harvests import make_corpus, run_harvest
from tests.analysis.test_one_head import ENTRY, dictionary, trained

RUNS = {
    "top1-k6": ENTRY,
    "mtc-k6": ENTRY | {"series": "mtc", "heads_per_feature": "all"},
    "mtc-resid": ENTRY | {"target": "resid_out"},
}


@pytest.fixture(scope="module")
def home(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile's data: cache, survey and a trained teacher."""
    home, model = tmp_path_factory.mktemp("nulls"), tiny_model("llama")
    run_harvest(model, home, corpus=make_corpus(model, train=12, heldout=4))
    write_json(home / "survey" / "layers.json", {"first": 1, "second": 2})
    trained(ActivationCache.open(home / "cache"), dictionary(), home / "teacher").save(home / "runs" / "top1-k6")
    return home


@pytest.fixture
def stage(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for module in (flow, target):
        monkeypatch.setattr(module, "open_cache", lambda stage, device: ActivationCache.open(stage.data / "cache"))
    return Stage("nulls", None, tmp_path / "params.yaml", {
        "profile": "test", "paths": {"data": str(home), "reports": str(home / "reports")}, "runs": RUNS,
        "machine": {"device": "cpu", "threads": 1}, "evaluation": {"detail_contexts": 2, "refit_contexts": 4},
        "training": {"steps": 12, "warmup_steps": 2, "checkpoint_every": 4, "start_contexts": 4,
                     "calibrate_contexts": 4, "evaluate_contexts": 2},
        "nulls": {"teacher": "top1-k6", "runs": ["mtc-k6", "top1-k6"]},
    })  # fmt: skip


def row(home: Path, run: str) -> bytes:
    return (home / "nulls" / f"{run}.json").read_bytes()


def planted(stage: Stage) -> Stage:
    target.null_target(stage)
    return stage


def of(stage: Stage, run: str | None) -> Stage:
    return replace(stage, name=f"nulls@{run}", run=run)


def test_a_killed_training_goes_on_and_writes_the_same_bytes(stage, home, monkeypatch):
    planted(stage)
    flow.nulls(of(stage, "mtc-k6"))
    whole, fit = row(home, "mtc-k6"), flow.fit

    def dies(*arguments, **keywords):
        def kill(step, metrics):
            if step >= 8:
                raise KeyboardInterrupt

        return fit(*arguments, **keywords, on_metrics=kill)

    (home / "nulls" / "mtc-k6.json").unlink()
    monkeypatch.setattr(flow, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        flow.nulls(of(stage, "mtc-k6"))
    (work,) = (Path(stage.source).parent / "work").iterdir()
    assert list(work.rglob("state.json")), "nothing to go on from"
    monkeypatch.setattr(flow, "fit", fit)
    flow.nulls(of(stage, "mtc-k6"))
    assert row(home, "mtc-k6") == whole
    assert not work.exists()


def test_target_and_rows_make_the_record_of_the_report(stage, home):
    planted(stage)
    for run in ("mtc-k6", "top1-k6"):
        flow.nulls(of(stage, run))
    record = null_record(
        json.loads((home / "null_target" / "target.json").read_text()),
        [json.loads(row(home, run)) for run in ("mtc-k6", "top1-k6")],
    )
    assert record.keys() == {"teacher", "teacher_normalised_mse", "noise_share", "rows", "comparisons"}
    assert record["teacher"] == "top1-k6"
    assert 0 < record["noise_share"] < 1
    assert [entry["seed"] for entry in record["rows"]] == [SEED_OFFSET, SEED_OFFSET], "a student starts elsewhere"
    for entry in record["rows"]:
        assert entry["normalised_mse"] > record["noise_share"], "nothing can predict the noise"
    assert record["rows"][1]["participation_ratio_mean"] == pytest.approx(1.0)
    assert (record["comparisons"]["mtc"]["first"], record["comparisons"]["mtc"]["second"]) == ("mtc", "top1")


def test_a_run_that_predicts_something_else_is_refused(stage):
    planted(stage)
    with pytest.raises(ValueError, match=r"'mtc-resid', which predicts resid_out .* predict the same"):
        flow.nulls(of(stage, "mtc-resid"))


def test_a_stage_without_its_run_and_a_target_without_its_teacher_are_refused(stage):
    with pytest.raises(ValueError, match=r"name a run of .*: --run <an entry of nulls\.runs>"):
        flow.nulls(of(stage, None))
    stage.sections["nulls"] = {"teacher": "none", "runs": ["mtc-k6"]}
    with pytest.raises(ValueError, match=r"nulls\.teacher names 'none', which is not under runs"):
        target.null_target(stage)
