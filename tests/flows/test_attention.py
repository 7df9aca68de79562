"""The stages attention and explain on a tiny model."""

import json
from pathlib import Path

import pytest
import yaml

from crosshead.activations.cache import ActivationCache
from crosshead.attention.registry import load_attention_model
from crosshead.io.files import write_json
from flows import attention as flow
from flows import explain as explain_flow
from flows._attention_runs import main, of_run, read_attention_run
from flows._runtime import Stage
from tests.activations.harvests import make_corpus, run_harvest

ENTRY = {"kind": "qk_diagonal", "series": "qk-rank1", "family": "qk", "layers": ["first"],
         "sparsity": {"kind": "batch_topk", "k": 4}}  # fmt: skip
SECTIONS = {
    "profile": "test",
    "runs": {},
    "machine": {"device": "cpu", "threads": 1},
    "attention_evaluation": {"detail_contexts": 2, "refit_contexts": 4, "splice_contexts": 1},
    "training": {"steps": 12, "warmup_steps": 2, "checkpoint_every": 4, "evaluate_every": 6, "start_contexts": 4,
                 "calibrate_contexts": 4, "evaluate_contexts": 2},
    "attention_models": {"qk_diagonal": {"features": 12, "heads": [1]}},
    "attention_runs": {"qk-a": ENTRY, "qk-b": ENTRY | {"rank": 2}},
    "explain": {"runs": ["qk-a"], "decisions": [{"text": "abc abc"}], "planted": [{"features": 3, "steps": 3}],
                "induction": {"sequences": 2, "length": 4, "text_contexts": 2, "top": 2, "permutations": 2,
                              "minimum_firings": 1}},
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tiny_model, tiny_model_directory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home, model = tmp_path_factory.mktemp("attention"), tiny_model("llama")
    run_harvest(model, home, corpus=make_corpus(model, train=12, heldout=4))
    write_json(home / "survey" / "layers.json", {"first": 1, "second": 2})
    (home / "model").symlink_to(tiny_model_directory("llama"))
    return home


@pytest.fixture
def stage(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for module in (flow, explain_flow):
        monkeypatch.setattr(module, "open_cache", lambda stage, device: ActivationCache.open(stage.data / "cache"))
    sections = SECTIONS | {"paths": {"data": str(home), "reports": str(tmp_path / "reports")}}
    return Stage("attention", None, tmp_path / "params.yaml", sections)


def test_a_run_is_trained_evaluated_recorded_and_tracked(stage, home, tmp_path):
    from mlflow import MlflowClient

    flow.attention(of_run(stage, "qk-a"))
    record = json.loads((tmp_path / "reports" / "attention" / "qk-a.json").read_text())
    assert (record["architecture"], record["series"], record["steps"]) == ("qk_diagonal", "qk-rank1", 12)
    assert record["normalised_mse"] == record["evaluation"]["keys"]["normalised_mse"]
    assert record["evaluation"]["patching"]["n_tokens"] > 0
    assert {r["name"] for r in record["evaluation"]["references"]} >= {"svd/1", "mean-score", "coordinates/1"}
    module = load_attention_model(home / "attention" / "qk-a")
    assert module.positions.rotates
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "test-qk"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["normalised_mse"] == record["normalised_mse"]
    assert float(run.data.tags["peak_mib"]) > 0
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]


def test_a_killed_run_ends_in_the_same_bytes(stage, tmp_path, monkeypatch):
    flow.attention(of_run(stage, "qk-b"))
    path = tmp_path / "reports" / "attention" / "qk-b.json"
    whole = path.read_bytes()
    path.unlink()
    evaluate = flow.evaluate

    def dies(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(flow, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        flow.attention(of_run(stage, "qk-b"))
    monkeypatch.setattr(flow, "evaluate", evaluate)
    flow.attention(of_run(stage, "qk-b"))
    assert path.read_bytes() == whole


def test_explain_writes_induction_features_decisions_and_planted_layers(stage, home):
    if not (home / "attention" / "qk-a").exists():
        flow.attention(of_run(stage, "qk-a"))
    explain_flow.explain(stage)
    written = (home / "explain" / "explain.json").read_bytes()
    record = json.loads(written)
    assert [row["run"] for row in record["induction"]] == ["qk-a"]
    [decision] = record["decisions"]
    assert sum(p["contribution"] for p in decision["pairs"]) + decision["rest"] + decision["base"] == pytest.approx(
        decision["predicted"], abs=1e-3
    )
    assert decision["deletion_difference"] < 1e-4
    assert record["planted"][0]["features"] == 3
    explain_flow.explain(stage)
    assert (home / "explain" / "explain.json").read_bytes() == written


def test_the_command_line_names_an_attention_run(stage, tmp_path, monkeypatch, capsys):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(stage.sections))
    seen = []

    def attention(stage: Stage) -> None:
        """A body that looks at what it gets."""
        seen.append((stage.name, stage.run))

    main(attention, arguments=["--params", str(path), "--run", "qk-a"])
    assert seen == [("attention@qk-a", "qk-a")]
    for arguments, message in ((["--run", "none"], "attention_runs.none is missing"), ([], "name a run")):
        with pytest.raises(SystemExit) as caught:
            main(attention, arguments=["--params", str(path), *arguments])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_wrong_runs_are_refused(stage):
    stage.sections["attention_runs"] = {"x": ENTRY | {"kind": "mtc"}, "y": ENTRY | {"features": 2}}
    with pytest.raises(ValueError, match=r"attention_runs\.x\.kind = 'mtc' is not an architecture"):
        read_attention_run(stage, "x")
    with pytest.raises(ValueError, match=r"attention_runs\.y\.sparsity\.k = 4 exceeds features = 2"):
        read_attention_run(stage, "y")
    stage.sections["explain"] = {"runs": ["z"]}
    with pytest.raises(ValueError, match=r"attention_runs\.z is missing"):
        explain_flow.explain(stage)
