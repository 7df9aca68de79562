import json
from pathlib import Path

import pytest

from crosshead.activations.cache import ActivationCache
from crosshead.io.files import write_json
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
    monkeypatch.setattr(flow, "open_cache", lambda stage, device: ActivationCache.open(stage.data / "cache"))
    return Stage("nulls", None, tmp_path / "params.yaml", {
        "profile": "test", "paths": {"data": str(home), "reports": str(home / "reports")}, "runs": RUNS,
        "machine": {"device": "cpu", "threads": 1}, "evaluation": {"detail_contexts": 2, "refit_contexts": 4},
        "training": {"steps": 12, "warmup_steps": 2, "checkpoint_every": 4, "start_contexts": 4,
                     "calibrate_contexts": 4, "evaluate_contexts": 2},
        "nulls": {"teacher": "top1-k6", "runs": ["mtc-k6", "top1-k6"]},
    })  # fmt: skip


def written(home: Path) -> bytes:
    return (home / "nulls" / "nulls.json").read_bytes()


def test_a_stage_killed_between_two_trainings_repeats_neither_and_writes_the_same_bytes(stage, home, monkeypatch):
    flow.nulls(stage)
    whole = written(home)
    begun, fit = [], flow.fit

    def dies(module, *arguments, **keywords):
        if begun:
            raise KeyboardInterrupt
        begun.append(keywords["description"])
        return fit(module, *arguments, **keywords)

    (home / "nulls" / "nulls.json").unlink()
    monkeypatch.setattr(flow, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        flow.nulls(stage)
    monkeypatch.setattr(flow, "fit", lambda *a, **k: begun.append(k["description"]) or fit(*a, **k))
    flow.nulls(stage)
    assert begun == ["null mtc-k6", "null top1-k6"]
    assert written(home) == whole
    assert not list((Path(stage.source).parent / "work").iterdir())


def test_the_record_names_teacher_noise_rows_and_comparison(stage, home):
    flow.nulls(stage)
    record = json.loads(written(home))
    assert record.keys() == {"teacher", "teacher_normalised_mse", "noise_share", "rows", "comparisons"}
    assert record["teacher"] == "top1-k6"
    assert 0 < record["noise_share"] < 1
    assert [row["run"] for row in record["rows"]] == ["mtc-k6", "top1-k6"]
    for row in record["rows"]:
        assert row["normalised_mse"] > record["noise_share"], "nothing can predict the noise"
    assert record["rows"][1]["participation_ratio_mean"] == pytest.approx(1.0)
    assert (record["comparisons"]["mtc"]["first"], record["comparisons"]["mtc"]["second"]) == ("mtc", "top1")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"teacher": "none", "runs": ["mtc-k6"]}, r"nulls\.teacher names 'none', which is not under runs"),
        ({"teacher": "top1-k6", "runs": ["none"]}, r"nulls\.runs names 'none', which is not under runs"),
        ({"teacher": "top1-k6", "runs": ["mtc-resid"]}, r"'mtc-resid', which predicts resid_out .* predict the same"),
    ],
)
def test_runs_that_do_not_fit_are_refused(section, message, stage):
    stage.sections["nulls"] = section
    with pytest.raises(ValueError, match=message):
        flow.nulls(stage)
