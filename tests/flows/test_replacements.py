"""The stages attention and replacements on a tiny model, with replacement layers."""

import json
from pathlib import Path

import pytest

from crosshead.activations.cache import ActivationCache
from crosshead.analysis.claims.replacement import findings
from crosshead.io.files import write_json
from flows import attention as training_flow
from flows import replacements as flow
from flows import train as dictionary_flow
from flows._attention_runs import of_run
from flows._runtime import Stage
from tests.activations.harvests import make_corpus, run_harvest

ENTRY = {"kind": "replacement", "family": "replacement", "layers": ["first"]}
OTHER = {"family": "test", "layers": ["first"], "features": 16, "sparsity": {"kind": "batch_topk", "k": 3}}
SECTIONS = {
    "profile": "test",
    "machine": {"device": "cpu", "threads": 1},
    "evaluation": {"detail_contexts": 2, "refit_contexts": 4, "splice_contexts": 1},
    "attention_evaluation": {"detail_contexts": 2, "refit_contexts": 4, "splice_contexts": 1},
    "training": {"steps": 6, "warmup_steps": 2, "checkpoint_every": 4, "evaluate_every": 6, "start_contexts": 4,
                 "calibrate_contexts": 4, "evaluate_contexts": 2},
    "dictionaries": {},
    "runs": {"mtc": OTHER | {"kind": "mtc", "series": "mtc"}, "sae": OTHER | {"kind": "attn_out_sae", "series": "sae"}},
    "attention_models": {"replacement": {"head_dim": 4}},
    "attention_runs": {
        "arl-wide": ENTRY | {"series": "arl-wide", "features": 12},
        "arl-narrow": ENTRY | {"series": "arl-narrow", "features": 4},
    },
    "replacements": {"heads_of": ["arl-wide"], "codes_of": ["arl-wide", "arl-narrow", "mtc", "sae"],
                     "trigram_heads": 2, "trigram_events": 1, "trigram_train_contexts": 12,
                     "trigram_heldout_contexts": 8, "sequences": 2, "length": 5,
                     "code": {"train_contexts": 4, "heldout_contexts": 2}},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_model, tiny_model_directory, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    home, model = tmp_path_factory.mktemp("replacements"), tiny_model("llama")
    run_harvest(model, home, corpus=make_corpus(model, train=12, heldout=8, n_tokens=12))
    write_json(home / "survey" / "layers.json", {"first": 1, "second": 2})
    (home / "model").symlink_to(tiny_model_directory("llama"))
    sections = SECTIONS | {"paths": {"data": str(home), "reports": str(home / "reports")}}
    stage = Stage("attention", None, home / "params.yaml", sections)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(home))
        for module in (training_flow, dictionary_flow):
            patch.setattr(module, "open_cache", lambda stage, device: ActivationCache.open(stage.data / "cache"))
        for run in SECTIONS["attention_runs"]:
            training_flow.attention(of_run(stage, run))
        for run in SECTIONS["runs"]:
            dictionary_flow.train(of_run(stage, run))
    return stage


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flow, "open_cache", lambda stage, device: ActivationCache.open(stage.data / "cache"))


def test_the_record_of_a_replacement_layer_holds_its_figures(trained):
    record = json.loads((trained.reports / "attention" / "arl-wide.json").read_text())
    assert (record["architecture"], record["features"], record["steps"]) == ("replacement", 12, 6)
    assert record["ce_recovered"] == record["evaluation"]["splicing"]["ce_recovered"]
    assert record["l0"] <= record["evaluation"]["heads_alive"] <= 12
    assert set(record["evaluation"]["rank_qk"]) == {"mean", "low", "median", "high"}


def test_heads_and_codes_are_written_and_judged(trained):
    flow.replacements(trained)
    path = trained.data / "replacements" / "replacements.json"
    first = path.read_bytes()
    found = json.loads(first)
    [heads] = found["heads"]
    assert heads["run"] == "arl-wide"
    assert heads["skip_trigrams"]["n_heads"] == len(heads["skip_trigrams"]["triples"]) > 0
    assert heads["induction"]["n_groups"] == 12
    codes = {row["run"]: row for row in found["description_lengths"]}
    assert set(codes) == {"arl-wide", "arl-narrow", "mtc", "sae"}
    assert codes["sae"]["bits_positions"] == 0
    assert all(row["bits"] > 0 for row in codes.values())
    records = [json.loads((trained.reports / "attention" / f"{run}.json").read_text())
               for run in SECTIONS["attention_runs"]]  # fmt: skip
    life, width = findings({"profile": "smoke", "attention": records, "replacements": found}, None)
    assert life.verdict == width.verdict == "inconclusive"  # one seed
    flow.replacements(trained)
    assert path.read_bytes() == first


@pytest.mark.parametrize(("key", "name", "message"), [
    ("heads_of", "arl", r"heads_of names 'arl', which is neither under attention_runs nor under runs"),
    ("codes_of", "arl", r"codes_of names 'arl', which is neither"),
    ("heads_of", "mtc", r"heads_of names 'mtc', a mtc; name replacement layers only"),
])  # fmt: skip
def test_wrong_names_are_told(trained, key, name, message):
    sections = trained.sections | {"replacements": trained.sections["replacements"] | {key: [name]}}
    if key == "codes_of":
        sections["replacements"]["heads_of"] = []
    with pytest.raises(ValueError, match=message):
        flow.replacements(Stage("replacements", None, Path("p.yaml"), sections))
