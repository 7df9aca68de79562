import json

import numpy as np
import pytest
import torch

from crosshead.activations.cache import ActivationCache
from crosshead.analysis import meaning
from crosshead.analysis.enrichment import EnrichmentConfig
from crosshead.analysis.labels import LabelConfig
from crosshead.analysis.meaning import MeaningConfig, Subject, describe
from crosshead.analysis.predictability import PredictabilityConfig
from crosshead.dictionaries.registry import build, config_class
from tests.activations.harvests import make_corpus, run_harvest

CONFIG = MeaningConfig(
    runs=("mtc", "top1", "value", "output"),
    sequences=3,
    length=10,
    succession_windows=1,
    labels=LabelConfig(minimum_firings=2, draws=2),
    predictability=PredictabilityConfig(fit_contexts=6, minimum_firings=2, bootstraps=20),
    clusters=EnrichmentConfig(k=5, shuffles=5, random_sets=5),
    induction_head_score=0.5,
    simulations=20,
    matched=(("mtc", "top1"),),
    matched_cosine=0.3,
)
FORMS = {
    "mtc": {"kind": "mtc", "layers": [1]},
    "top1": {"kind": "mtc", "layers": [1], "heads_per_feature": 1},
    "value": {"kind": "value_sae", "layers": [1, 2]},
    "output": {"kind": "attn_out_sae", "layers": [1]},
}


@pytest.fixture(scope="module")
def setting(tiny_model, tmp_path_factory):
    model = tiny_model("llama")
    path = tmp_path_factory.mktemp("meaning")
    cache = ActivationCache.open(run_harvest(model, path, corpus=make_corpus(model, heldout=8)))
    subjects = []
    for name, form in FORMS.items():
        config = config_class(form["kind"]).model_validate(
            form | {"features": 48, "sparsity": {"kind": "topk", "k": 8}}
        )
        module = build(config, model.dims).train()
        batches = [cache.read("train", [0, 1, 2, 3], (*module.sites, *module.start_sites))]
        module.start_(batches, cache.weights(), torch.Generator().manual_seed(0))
        subjects.append(Subject(name, module.eval(), np.arange(48) != 5))
    survey = [{"layer": layer, "head": head, "induction": 0.6 * (head == 2)} for layer in range(3) for head in range(4)]
    return subjects, cache, model, survey


@pytest.fixture(scope="module")
def document(setting):
    return describe(*setting, CONFIG)


def test_the_document_is_plain_json_and_reproducible(document, setting):
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert describe(*setting, CONFIG) == document


def test_every_run_is_described(document):
    assert list(document["runs"]) == list(FORMS)
    for name, run in document["runs"].items():
        assert run["architecture"] == FORMS[name]["kind"]
        assert run["n_live"] == 47
        assert set(run["labels"]) == {"induction", "previous_token", "duplicate_token", "same_position", "delimiter",
                                      "code", "succession", "none"}  # fmt: skip
        assert all(0 <= label["count"] <= 47 for label in run["labels"].values())
        assert run["breadth"]["interval"][0] <= run["breadth"]["median"] <= run["breadth"]["interval"][1]


def test_each_side_is_predicted_where_the_dictionary_has_it(document):
    sides = {name: {side: run["predictability"][side] is not None for side in ("from", "to")}
             for name, run in document["runs"].items()}  # fmt: skip
    both = {"from": True, "to": True}
    assert sides == {"mtc": both, "top1": both, "value": {"from": True, "to": False},
                     "output": {"from": False, "to": True}}  # fmt: skip


def test_only_features_with_fixed_heads_have_clusters(document):
    with_heads = {"mtc", "top1", "value"}
    assert {record["run"] for record in document["ov_dimensions"]} == with_heads
    assert set(document["enrichment_summary"]) == set(document["modality"]) == with_heads
    sizes = [record["size"] for record in document["ov_dimensions"] if record["run"] == "mtc"]
    assert (len(sizes), sum(sizes)) == (5, 47)
    assert len([r for r in document["ov_dimensions"] if r["run"] == "top1"]) <= 4  # one vector per head


def test_mass_of_heads_adds_up_and_the_survey_names_the_induction_heads(document):
    heads = document["runs"]["mtc"]["induction_heads"]
    assert heads["survey_heads"] == [{"layer": 1, "head": 2, "score": 0.6}]
    assert 0 < heads["expected_share"] < 1
    if heads["interval"] is not None:
        assert heads["interval"][0] <= heads["share_on_survey_heads"] <= heads["interval"][1]


def test_the_interval_of_a_share_is_that_of_resampled_features():
    whole = np.arange(1.0, 31.0)
    same = meaning._share_interval(0.25 * whole, whole, CONFIG)
    assert same == pytest.approx([0.25, 0.25])
    part = whole * (np.arange(30) % 2)
    low, high = meaning._share_interval(part, whole, CONFIG)
    assert low < part.sum() / whole.sum() < high
    assert meaning._share_interval(part[:9], whole[:9], CONFIG) is None


def test_two_dictionaries_of_one_kind_are_matched(document):
    (found,) = document["matches"]
    assert (found["first"], found["second"]) == ("mtc", "top1")
    assert 0 < found["n_matched"] <= min(found["n_live"])
    assert len(found["pairs"]) == min(8, found["n_matched"])


def test_of_runs_at_other_settings_only_what_verdicts_ask_for_is_kept(document, setting):
    config = CONFIG.model_copy(update={"runs": ("mtc", "top1"), "settings": ("value", "output")})
    found = describe(*setting, config)
    whole, brief = document["runs"]["value"], found["settings"]["value"]
    assert {name: brief[name] for name in whole if name != "examples"} == {
        name: whole[name] for name in whole if name != "examples"
    }
    assert set(brief) == set(whole) - {"examples"} | {"enrichment_summary", "modality"}
    assert brief["enrichment_summary"] == document["enrichment_summary"]["value"]
    test = document["modality"]["value"]["ov_dimension"]
    assert brief["modality"] == {"ov_dimension": {name: test[name] for name in test if name != "power"}}
    of_output = found["settings"]["output"]
    assert (of_output["enrichment_summary"], of_output["modality"]) == (None, None)
    assert "value" not in found["runs"]
    assert found["ov_dimensions"] == [record for record in document["ov_dimensions"] if record["run"] != "value"]
    with pytest.raises(ValueError, match="'value' stands twice under runs and settings"):
        MeaningConfig(runs=("value",), settings=("value",))


def test_a_matched_run_that_is_not_described_is_refused(setting):
    config = CONFIG.model_copy(update={"matched": (("mtc", "other"),)})
    with pytest.raises(ValueError, match=r"meaning\.matched names 'other', which is not under meaning\.runs"):
        describe(*setting, config)


def test_contexts_longer_than_the_model_allows_are_refused(setting):
    subjects, cache, model, survey = setting
    with pytest.raises(ValueError, match=r"meaning\.length=64 makes contexts of 129 tokens.*lower it to 63"):
        describe(subjects, cache, model, survey, CONFIG.model_copy(update={"length": 64}))
