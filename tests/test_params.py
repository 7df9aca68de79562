"""Parameter files: the committed ones are valid, wrong ones say what is wrong, what was got and what to do."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from crosshead.activations.survey import LayerChoice
from crosshead.attention.registry import KINDS as ATTENTION_KINDS
from crosshead.dictionaries.registry import KINDS
from crosshead.params import load_params

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "params.yaml", *sorted(ROOT.glob("flows/profiles/*/params.yaml"))]


@pytest.fixture
def sections() -> dict:
    return yaml.safe_load((ROOT / "flows/profiles/smoke/params.yaml").read_text())


def fault(tmp_path: Path, sections: dict) -> str:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(sections))
    with pytest.raises(ValueError, match=r"params\.yaml: ") as caught:
        load_params(path)
    return str(caught.value).replace(str(path), "params.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_every_committed_profile_is_valid(path: Path):
    params = load_params(path)
    assert (ROOT / params.paths.params).resolve() == path
    assert (path.parent / params.paths.root).resolve() == ROOT
    assert (ROOT / params.paths.inputs).is_dir()


def test_there_are_four_profiles_with_outputs_of_their_own():
    every = [load_params(path) for path in FILES]
    assert {params.profile for params in every} == {"laptop", "smoke", "evidence", "gpu"}
    assert len({params.paths.data for params in every}) == len({params.paths.reports for params in every}) == 4


def test_smoke_has_at_most_twelve_runs_and_every_architecture():
    runs = load_params(ROOT / "flows/profiles/smoke/params.yaml").runs
    assert len(runs) <= 12
    assert {run.kind for run in runs.values()} == set(KINDS)


def test_smoke_has_every_kind_of_attention_model():
    runs = load_params(ROOT / "flows/profiles/smoke/params.yaml").attention_runs
    assert len(runs) <= 4
    assert {run.kind for run in runs.values()} == set(ATTENTION_KINDS)


def test_evidence_has_the_seeds_and_sparsities_that_the_rules_on_rank_one_and_on_width_ask_for():
    runs = load_params(ROOT / "flows/profiles/evidence/params.yaml").attention_runs.values()
    for series, n_sparsities in (("qk-rank1", 5), ("arl-wide", 1), ("arl-narrow", 1)):
        seeds = [run.seed for run in runs if run.series == series]
        assert sorted(seeds) == sorted([3, 4, 5] * n_sparsities), series


def test_gpu_replaces_attention_by_1024_heads():
    run = load_params(ROOT / "flows/profiles/gpu/params.yaml").attention_runs["arl-wide"]
    assert run.dictionary_config({"first": 17}).features == 1024


def test_runs_are_named_by_the_features_that_they_have():
    for path in (ROOT / "params.yaml", *ROOT.glob("flows/profiles/*/params.yaml")):
        for name, run in load_params(path).attention_runs.items():
            if (told := re.search(r"features(\d+)", name)) is not None:
                assert int(told[1]) == run.dictionary_config({"first": 17}).features, f"{path}: {name}"
                assert told[0] in run.series, f"{path}: {name}"


def test_gpu_trains_100_000_features_on_tens_of_millions_of_tokens():
    params = load_params(ROOT / "flows/profiles/gpu/params.yaml")
    mtcs = [run for run in params.runs.values() if run.kind == "mtc"]
    assert all(run.dictionary_config({"first": 17, "second": 23, "adjacent": 18}).features == 100_000 for run in mtcs)
    schedule = mtcs[0].schedule
    assert schedule.steps * schedule.contexts_per_batch * params.corpus.context_length > 20e6
    assert schedule.autocast == "bf16"


WRONG = {
    "null of a run that is none": (
        "nulls.teacher", "top1-k6", "nulls.teacher names 'top1-k6', which is not under runs; did you mean 'top1-k60'?"
    ),
    "a match of a run that is not described": (
        "meaning.matched", [["mtc-k60", "mtc-k20"]], "meaning.matched names 'mtc-k20', which is not under meaning.runs"
    ),
    "meaning at a setting of a run that is none": ("meaning.settings", ["mct"], "meaning.settings names 'mct'"),
    "meaning of a run that is none": ("meaning.runs", ["mct-k60"], "meaning.runs names 'mct-k60'"),
    "control without its site": (
        "harvest.sites", [{"layer": "first", "names": ["resid_in", "q", "k", "v", "attn_out"]},
                          {"layer": "second", "names": ["v"]}],
        "runs.value-both-shared-k16.layers: harvest.sites lacks v_shared_input of layer second",
    ),
    "misspelt parameter": (
        "training.stepz", 40, "params.yaml: training.stepz is not a parameter (got 40); did you mean 'steps'?"
    ),
    "misspelt section": ("trainnig", {}, "params.yaml: trainnig is not a section; did you mean 'training'?"),
    "unknown parameter": ("survey.zzz", 1, "survey.zzz is not a parameter (got 1); choose one of: sequences"),
    "wrong type": ("training.steps", "many", "training.steps = 'many': input should be a valid integer"),
    "out of range": ("training.steps", 0, "training.steps = 0: input should be greater than 0"),
    "no such choice": ("machine.device", "tpu", "machine.device = 'tpu': input should be 'auto', 'cpu' or 'cuda'"),
    "model source": ("model.source", "ftp", "model.source = 'ftp': input should be 'pypi', 'hub' or 'local'"),
    "unknown architecture": (
        "runs.mtc-k20.kind", "mct", "runs.mtc-k20.kind = 'mct' is not an architecture; did you mean 'mtc'?"
    ),
    "defaults of an unknown architecture": ("dictionaries.clt", {}, "dictionaries.clt is not an architecture"),
    "misspelt default": (
        "dictionaries.mtc.featurs", 9, "dictionaries.mtc.featurs is not a parameter; did you mean 'features'?"
    ),
    "wrong schedule of an architecture": (
        "dictionaries.mtc.training", {"steps": 0}, "dictionaries.mtc.training.steps = 0: input should be greater than 0"
    ),
    "misspelt parameter of a run": (
        "runs.mtc-k20.heads_per_featur", 2,
        "runs.mtc-k20.heads_per_featur is not a parameter (got 2); did you mean 'heads_per_feature'?",
    ),
    "missing sparsity parameter": (
        "runs.mtc-k20.sparsity", {"kind": "batch_topk"}, "runs.mtc-k20.sparsity.k is missing; add it"
    ),
    "misspelt sparsity parameter": (
        "runs.mtc-k20.sparsity", {"kind": "batch_topk", "k": 3, "anneal_form": 3},
        "runs.mtc-k20.sparsity.anneal_form is not a parameter (got 3); did you mean 'anneal_from'?",
    ),
    "unknown sparsity": ("runs.mtc-k20.sparsity", {"kind": "top_k", "k": 3}, "runs.mtc-k20.sparsity = "),
    "layer name": (
        "runs.mtc-k20.layers", ["frist"], "runs.mtc-k20.layers names 'frist', which is no layer; did you mean 'first'?"
    ),
    "too many layers": ("runs.mtc-k20.layers", ["first", "second"], "runs.mtc-k20.layers"),
    "misspelt override": (
        "runs.mtc-k20.training", {"stepz": 3}, "runs.mtc-k20.training.stepz is not a parameter (got 3)"
    ),
    "run without a series": ("runs.mtc-k20.series", None, "runs.mtc-k20.series = None"),
    "architecture that is no name": (
        "runs.mtc-k20.kind", ["mtc"], "runs.mtc-k20.kind = ['mtc'] is not an architecture"
    ),
    "defaults that are no mapping": (
        "dictionaries.mtc", 3, "dictionaries.mtc = 3 is not a mapping; give it parameters"
    ),
    "schedule of an architecture that is no mapping": (
        "dictionaries.mtc.training", 3, "dictionaries.mtc.training = 3 is not a mapping; give it parameters"
    ),
    "schedule of a run that is no mapping": ("runs.mtc-k20.training", 3, "runs.mtc-k20.training = 3: "),
    "section that is no mapping": ("machine", [], "machine = []: input should be a valid dictionary"),
    "paths that are no mapping": ("paths", "data", "paths = 'data': input should be a valid dictionary"),
    "boolean for a number": ("training.steps", True, "training.steps = True: input should be a number"),
    "boolean inside a run": (
        "runs.mtc-k20.sparsity.k", True, "runs.mtc-k20.sparsity.k = True: input should be a number"
    ),
    "boolean for a number of movers": (
        "runs.mtc-k20.heads_per_feature", True, "runs.mtc-k20.heads_per_feature = True: input should be a number"
    ),
    "boolean for a seed": ("runs.mtc-k20.seed", False, "runs.mtc-k20.seed = False: input should be a number"),
    "infinity": (
        "training.learning_rate", float("inf"), "training.learning_rate = inf: input should be a finite number"
    ),
    "no number at all": ("training.learning_rate", float("nan"), "training.learning_rate = nan: "),
    "infinity inside a run": (
        "runs.mtc-k20.sparsity", {"kind": "l1", "coefficient": float("inf")},
        "runs.mtc-k20.sparsity.coefficient = inf: input should be a finite number",
    ),
    "unknown profile": ("profile", "labtop", "profile = 'labtop' is not a profile; did you mean 'laptop'?"),
    "layer twice": (
        "runs.value-both-k16.layers", ["first", "first"],
        "runs.value-both-k16.layers = ['first', 'first'] names a layer twice; give each once",
    ),
    "number twice": (
        "runs.value-both-k16.layers", [3, 3], "runs.value-both-k16.layers: got layers [3, 3]; give numbers"
    ),
    "layers from above": ("runs.value-both-k16.layers", [9, 3], "runs.value-both-k16.layers: got layers [9, 3]"),
    "negative layer": ("runs.mtc-k20.layers", [-1], "runs.mtc-k20.layers: got layers [-1]; give numbers from 0 on"),
    "boolean layer": ("runs.mtc-k20.layers", [True], "runs.mtc-k20.layers.0 = True: input should be a number"),
    "k above the features": (
        "runs.mtc-k20.sparsity.k", 600,
        "runs.mtc-k20.sparsity.k = 600 exceeds features = 512; lower it or raise features",
    ),
    "cluster of an unknown run": (
        "clusters.runs", ["mtc-k6O"], "clusters.runs names 'mtc-k6O', which is not under runs; did you mean 'mtc-k60'?"
    ),
    "layer that is not harvested": (
        "runs.value-first-k8.layers", ["adjacent"],
        "runs.value-first-k8.layers: harvest.sites lacks v of layer adjacent; add {layer: adjacent, names: [v]} to it",
    ),
    "number that is not harvested": (
        "runs.mtc-k20.layers", [5],
        "runs.mtc-k20.layers: harvest.sites lacks attn_out, k, q, resid_in, v of layer 5; add {layer: 5, names: [",
    ),
    "site that is not harvested": (
        "runs.attn-out-k20.layers", ["second"],
        "runs.attn-out-k20.layers: harvest.sites lacks attn_out of layer second; add {layer: second, names: [",
    ),
    "surveyed layers of the wrong number": (
        "survey.layers", [3, 9], "got survey.layers = [3, 9]; write auto or three layers, [first, second, adjacent]"
    ),
    "negative surveyed layer": ("survey.layers", [3, -9, 4], "survey.layers lists -9; layers are numbers from 0 on"),
    "negative surveyed layer by name": (
        "survey.layers", {"first": 3, "second": 9, "adjacent": -4},
        "survey.layers.adjacent = -4: input should be greater than or equal to 0",
    ),
    "surveyed layers from above": (
        "survey.layers", [9, 3, 10], "survey.layers: first=9 lies above second=3; exchange them"
    ),
    "explained run that is none": (
        "explain.runs", ["qk-rank1-k5"],
        "explain.runs names 'qk-rank1-k5', which is not under attention_runs; did you mean 'qk-rank1-k4'?",
    ),
    "explained run of another kind": (
        "explain.runs", ["arl-wide"], "explain.runs names 'arl-wide', a replacement; name runs of qk_diagonal only"
    ),
    "decision of a run that is not explained": (
        "explain.decisions", [{"text": "a b a", "run": "qk-rank2-k4"}],
        "explain.decisions names 'qk-rank2-k4', which is not under explain.runs; add it there",
    ),
    "heads of another kind": (
        "replacements.heads_of", ["qk-rank1-k4"],
        "replacements.heads_of names 'qk-rank1-k4', a qk_diagonal; name runs of replacement only",
    ),
    "code of a run that is none": (
        "replacements.codes_of", ["mtc-k6O"],
        "replacements.codes_of names 'mtc-k6O', which is not under attention_runs or runs; did you mean 'mtc-k60'?",
    ),
    "unknown attention model": (
        "attention_runs.arl-wide.kind", "mtc", "attention_runs.arl-wide.kind = 'mtc' is not an architecture"
    ),
    "misspelt attention parameter": (
        "attention_models.replacement.head_dimm", 4,
        "attention_models.replacement.head_dimm is not a parameter; did you mean 'head_dim'?",
    ),
    "layer of an attention run that is not harvested": (
        "attention_runs.qk-rank1-k4.layers", ["second"],
        "attention_runs.qk-rank1-k4.layers: harvest.sites lacks k, q of layer second",
    ),
    "run that is no mapping": ("runs.mtc-k20", 60, "runs.mtc-k20 = 60 is not a mapping; give it kind"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named_with_its_key_and_a_remedy(name: str, tmp_path: Path, sections: dict):
    key, value, expected = WRONG[name]
    *parents, last = key.split(".")
    place = sections
    for parent in parents:
        place = place[parent]
    place[last] = value
    message = fault(tmp_path, sections)
    assert expected in message
    assert len(message.splitlines()) == 1


def test_a_run_may_read_numbered_layers_that_are_harvested(tmp_path: Path, sections: dict):
    path = tmp_path / "params.yaml"
    sections["harvest"]["sites"].append({"layer": 3, "names": ["v"]})
    del sections["runs"]["value-both-shared-k16"]  # made of the lowest harvested layer's input
    sections["runs"]["value-both-k16"]["layers"] = [3, "first"]
    path.write_text(yaml.safe_dump(sections))
    run = load_params(path).runs["value-both-k16"]
    assert run.dictionary_config({"first": 17}).layers == (3, 17)
    assert run.dictionary_config({"first": 1}).layers == (1, 3)


def test_layers_named_by_hand_are_harvested_under_either_name(tmp_path: Path, sections: dict):
    path = tmp_path / "params.yaml"
    sections["survey"]["layers"] = [17, 23, 18]
    sections["runs"]["value-both-k16"]["layers"] = [17, "second"]
    path.write_text(yaml.safe_dump(sections))
    params = load_params(path)
    assert params.survey.layers == LayerChoice(first=17, second=23, adjacent=18)
    sections["runs"]["value-both-k16"]["layers"] = [17, 18]
    assert "harvest.sites lacks v of layer 18" in fault(tmp_path, sections)


def test_an_architecture_itself_says_which_sites_it_reads(tmp_path: Path, sections: dict):
    sections["harvest"]["sites"] = [{"layer": "first", "names": ["q", "k", "v"]}, {"layer": "second", "names": ["v"]}]
    message = fault(tmp_path, sections)
    assert "runs.mtc-k20.layers: harvest.sites lacks attn_out, resid_in of layer first" in message
    assert "runs.value-both-k16" not in message
    assert "attention_runs.arl-wide.layers: harvest.sites lacks attn_out, resid_in of layer first" in message
    assert "attention_runs.qk-rank1-k4" not in message
    sections["runs"] = {"heads": sections["runs"]["attn-out-k20"] | {"per_head": True}}
    sections["attention_runs"] = {"qk-rank1-k4": sections["attention_runs"]["qk-rank1-k4"]}
    sections["replacements"] |= {"heads_of": [], "codes_of": ["heads"]}
    sections["clusters"]["runs"] = sections["meaning"]["runs"] = ["heads"]
    sections["meaning"]["matched"] = []
    sections["nulls"] = {"teacher": "heads", "runs": ["heads"]}
    assert "lacks" not in (message := fault(tmp_path, sections))
    for key in ("runs", "teacher"):
        assert f"nulls.{key} names 'heads', a attn_out_sae; name runs of mtc only" in message


def test_a_missing_section_is_named(tmp_path: Path, sections: dict):
    del sections["survey"]
    assert "survey is missing; add it" in fault(tmp_path, sections)


def test_all_faults_are_told_at_once(tmp_path: Path, sections: dict):
    sections["training"]["steps"] = -1
    sections["machine"]["threads"] = 0
    message = fault(tmp_path, sections)
    assert "training.steps = -1" in message
    assert "machine.threads = 0" in message


def test_a_run_overrides_its_architecture_which_overrides_training(tmp_path: Path, sections: dict):
    sections["training"]["steps"] = 10
    sections["dictionaries"]["value_sae"]["training"] = {"steps": 20}
    other = copy.deepcopy(sections["runs"]["value-first-k8"])
    sections["runs"]["own"] = other | {"training": {"steps": 30}, "features": 9}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(sections))
    runs = load_params(path).runs
    assert [runs[name].schedule.steps for name in ("mtc-k20", "value-first-k8", "own")] == [10, 20, 30]
    assert runs["own"].dictionary_config({"first": 3}).features == 9
    assert runs["own"].dictionary_config({"first": 3}).layers == (3,)


def test_the_command_prints_one_line_and_no_traceback(tmp_path: Path, sections: dict):
    sections["training"]["stepz"] = 40
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(sections))
    command = [sys.executable, "-m", "crosshead.params", path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"{path}: training.stepz is not a parameter (got 40); did you mean 'steps'?")


@pytest.mark.parametrize("section", ["runs", "attention_runs"])
def test_a_run_that_no_stage_can_be_named_after_is_refused(tmp_path: Path, sections: dict, section: str):
    entry = next(iter(sections[section].values()))
    sections[section]["rate0.5"] = entry
    assert f"{section}.rate0.5: files and DVC stages take the name of a run" in fault(tmp_path, sections)
