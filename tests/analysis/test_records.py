import json

import pytest

from crosshead.analysis.evaluation import Evaluation
from crosshead.analysis.records import run_record
from crosshead.analysis.splicing import Splicing
from crosshead.dictionaries.registry import build
from crosshead.training.runs import read_run
from tests.dictionaries.cases import DIMS

SPLICED = Splicing(n_tokens=1, ce_clean=1.0, ce_spliced=1.1, ce_zero=3.0, ce_mean=2.0, delta_ce=0.1, kl=0.1,
                   ce_recovered=0.9, ce_recovered_zero=0.95, context_delta_ce=[0.1])  # fmt: skip
MEASURED = Evaluation(n_tokens=1, n_contexts=1, l0=3.0, l1=1.0, normalised_mse=0.5, normalised_mse_refit=0.5,
                      shrinkage=1.0, dead_fraction=0.0, feature_counts=[1], density_histogram=[1],
                      density_edges=[0.0], sites=[], context_squared_error=[1.0], context_variance=[2.0])  # fmt: skip
ENTRY = {"series": "s", "family": "f", "features": 12, "sparsity": {"kind": "topk", "k": 3}}


def make_record(entry: dict, detail: dict[str, float] | None = None) -> dict:
    run = read_run("name", ENTRY | entry, {}, {"learning_rate": 1e-3, "steps": 7}, "params.yaml")
    module = build(run.dictionary_config({}), DIMS)
    return run_record(run, module, MEASURED, SPLICED, tokens_trained=5, control_detail=detail)


def test_a_record_says_how_the_run_was_started_and_trained():
    record = make_record({"kind": "mtc", "layers": [2], "start": "random", "training": {"learning_rate": 2e-3}})
    assert (record["start"], record["learning_rate"], record["steps"]) == ("random", 2e-3, 7)
    assert (record["control"], record["control_detail"]) == ("none", None)


@pytest.mark.parametrize("control", ["other_contexts", "matched_tokens", "shared_input"])
def test_a_record_says_what_its_control_was(control: str):
    detail = {"pair": 0.5, "token": 0.3, "any": 0.2}
    record = make_record({"kind": "value_sae", "layers": [2, 4], "control": control}, detail)
    assert (record["control"], record["control_detail"], record["start"]) == (control, detail, None)
    json.dumps(record)


def test_an_unknown_control_is_refused_by_name():
    with pytest.raises(ValueError, match=r"runs\.name\.control = 'shuffled'"):
        make_record({"kind": "value_sae", "layers": [2, 4], "control": "shuffled"})
