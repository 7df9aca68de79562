from pathlib import Path
from types import SimpleNamespace

import pytest

from crosshead.activations.planted import PlantedConfig
from crosshead.analysis import planted_suite, planted_trials
from crosshead.analysis.planted_suite import PlantedSuiteConfig, run_suite
from crosshead.analysis.planted_trials import layer_trial
from crosshead.training.fit import TrainingConfig

EASY = PlantedConfig(
    train_contexts=1024, heldout_contexts=64, context_length=24, vocabulary=16, d_model=36, features=24, l0=2.0,
    heads=("previous_token", "duplicate_token", "delimiter"), families=4, noise=0.0,
)  # fmt: skip
QUICK = TrainingConfig(steps=1_200, contexts_per_batch=8, learning_rate=8e-3, evaluate_every=1_000,
                       checkpoint_every=1_000, start_contexts=128)  # fmt: skip
TINY = {"train_contexts": 48, "heldout_contexts": 16, "context_length": 12, "vocabulary": 8, "delimiters": 2,
        "d_model": 12, "features": 12, "l0": 1.0, "families": 3, "heads": ["previous_token", "local"]}  # fmt: skip
PHASES = {"mixing": [0.0, 1.0], "noise": [0.0], "l0": [1.0]}
SHORT = {"steps": 8, "contexts_per_batch": 4, "start_contexts": 16, "calibrate_contexts": 16}


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the suite asks of layers, with the null where a verdict needs it; a superposed layer is learned sooner."""
    soon = QUICK.model_copy(update={"steps": 500, "learning_rate": 1.2e-2})
    features = PlantedSuiteConfig(layer=EASY).n_features
    return {
        "one-head": layer_trial(EASY, QUICK, features, 0, tmp_path_factory.mktemp("one-head"), with_null=False),
        "superposed": layer_trial(EASY.model_copy(update={"mixing": 1.0}), soon, features, 0,
                                  tmp_path_factory.mktemp("superposed"), with_null=True),
    }  # fmt: skip


def test_most_of_an_easy_layer_is_found_soon_and_top1_fails_only_where_features_have_several_heads(easy):
    """A quick version: 24 features, so a miss is 4%, and half of the full suite's steps."""
    share = {(layer, row["architecture"]): row["share_recovered"] for layer in easy for row in easy[layer]["rows"]}
    assert share["one-head", "mtc"] >= 0.75
    assert share["superposed", "mtc"] >= 0.9
    assert share["one-head", "top1"] >= 0.65
    assert share["superposed", "top1"] <= 0.2


def test_many_heads_gain_far_more_where_features_have_several(easy):
    assert planted_suite._verdict(easy["superposed"], PlantedSuiteConfig().margin)["superposed"]
    assert easy["superposed"]["ratio"] < 0.2
    assert easy["one-head"]["ratio"] > 3 * easy["superposed"]["ratio"]


def tiny(**changes) -> PlantedSuiteConfig:
    sections = {
        "layer": TINY, "training": SHORT, "shared_layers": {"layers": TINY | {"layers": 2}, "features": 12,
        "training": SHORT}, "toys": {"toy": {"steps": 3, "train_contexts": 32, "heldout_contexts": 8}, "features": 16,
        "training": SHORT},
        "questions": ["recovery", "superposition", "shared_layers", "toys", "phases"],
    }  # fmt: skip
    sections |= {"phases": PHASES | {"training": SHORT, "seeds": 1 + changes.get("commit_seed", False)}}
    return PlantedSuiteConfig.model_validate(sections | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    work = tmp_path_factory.mktemp("tiny")
    return work, run_suite(tiny(commit_seed=True), work, "0123abcd")


def test_every_question_has_its_rows(finished):
    _, found = finished
    counts: dict[tuple, int] = {}
    for row in found["rows"]:
        counts[row["question"], row["seed"]] = counts.get((row["question"], row["seed"]), 0) + 1
    derived = found["commit_seed"]
    assert found["seeds"] == [0, derived]
    per_seed = {"recovery": 4, "superposition": 2, "shared_layers": 3, "toys": 2, "phases": 2}
    assert counts == {(question, seed): n for question, n in per_seed.items() for seed in (0, derived)}


def test_finished_trials_are_not_run_again(finished, monkeypatch):
    work, found = finished
    for name in ("layer_trial", "shared_trial", "toy_trial", "phase_trial"):
        monkeypatch.setattr(planted_suite, name, lambda *_, **__: pytest.fail("ran again"))
    assert run_suite(tiny(commit_seed=True), work, "0123abcd") == found
    assert [path for path in work.iterdir() if path.is_dir()] == []


def test_of_several_starts_the_best_counts_for_both_architectures(monkeypatch, tmp_path):
    errors = {("all", 7): 0.3, ("all", 107): 0.2, (1, 7): 0.4, (1, 107): 0.5}

    def train(config, source, training, seed, work):
        return SimpleNamespace(evaluation=SimpleNamespace(normalised_mse=errors[config.heads_per_feature, seed]))

    monkeypatch.setattr(planted_trials, "_train", train)
    pair = planted_trials._pair(None, QUICK, 8, 1, 7, tmp_path, starts=2)
    assert planted_trials._ratio(pair) == pytest.approx(0.2 / 0.4)


def test_toys_and_phases_may_take_fewer_seeds(finished):
    work, found = finished
    fewer = tiny(commit_seed=True).toys.model_copy(update={"seeds": 1})
    config = tiny(commit_seed=True, toys=fewer.model_dump())
    rows = run_suite(config, work, "0123abcd")["rows"]
    assert rows == [row for row in found["rows"] if (row["question"], row["seed"]) != ("toys", found["commit_seed"])]
    for name in ("toys", "phases"):
        section = getattr(config, name).model_copy(update={"seeds": 3}).model_dump()
        with pytest.raises(ValueError, match=f"got {name}.seeds=3 of 2 seeds; lower it"):
            tiny(commit_seed=True, **{name: section})


def test_a_suite_that_was_killed_ends_with_the_same_figures(finished, tmp_path, monkeypatch):
    _, found = finished
    calls, real = [], planted_suite.toy_trial

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(planted_suite, "toy_trial", dies)
    with pytest.raises(KeyboardInterrupt):
        run_suite(tiny(), tmp_path)
    monkeypatch.setattr(planted_suite, "toy_trial", real)
    again = run_suite(tiny(), tmp_path)
    assert again["rows"] == [row for row in found["rows"] if row["seed"] == 0]


def test_another_commit_gives_another_seed():
    seeds = {planted_suite._commit_seed(commit) for commit in ("a", "b", "a")}
    assert len(seeds) == 2
    with pytest.raises(ValueError, match="needs a git commit"):
        run_suite(tiny(commit_seed=True), Path("nowhere"), None)


@pytest.mark.parametrize(("ratio", "null", "superposed"), [(0.95, 0.96, False), (0.4, 0.96, True), (0.88, 0.96, False)])
def test_the_null_and_not_one_is_the_yardstick(ratio, null, superposed):
    found = planted_suite._verdict({"ratio": ratio, "null_ratio": null}, 0.1)
    assert found["superposed"] is superposed


def test_seeds_and_questions_are_named_once():
    with pytest.raises(ValueError, match="give each once"):
        PlantedSuiteConfig(seeds=(1, 1))
