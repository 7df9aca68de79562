import json
from collections.abc import Sequence

import pytest
import torch
from torch.testing import assert_close

from crosshead.activations.batches import Batches
from crosshead.activations.cache import ActivationCache
from crosshead.analysis import one_head
from crosshead.analysis.evaluation import EvaluationConfig, evaluate
from crosshead.analysis.frontiers import null_record
from crosshead.analysis.one_head import NullConfig, PlantedSource, null_row
from crosshead.dictionaries.base import Batch, Site
from crosshead.dictionaries.registry import build, config_class
from crosshead.training.fit import TrainingConfig, fit
from crosshead.training.runs import read_run
from tests.activations.harvests import make_corpus, run_harvest

TARGET = Site(1, "attn_out")
SITES = (Site(1, "resid_in"), Site(1, "pattern"), TARGET)
ENTRY = {"kind": "mtc", "series": "top1", "family": "test", "layers": [1], "features": 48, "heads_per_feature": 1,
         "sparsity": {"kind": "batch_topk", "k": 6}}  # fmt: skip
STEPS = TrainingConfig(steps=60, warmup_steps=5, evaluate_contexts=3, start_contexts=12, calibrate_contexts=12)


@pytest.fixture(scope="module")
def cache(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    model = tiny_model("llama")
    corpus = make_corpus(model, train=24, heldout=5)
    return ActivationCache.open(run_harvest(model, tmp_path_factory.mktemp("one-head"), corpus=corpus))


def dictionary(**changes):
    fields = {name: value for name, value in ENTRY.items() if name not in ("series", "family")} | changes
    return config_class(fields["kind"]).model_validate(fields)


def trained(source, config, work, steps: TrainingConfig = STEPS):
    module = build(config, source.dims)
    train = Batches(source, "train", (*module.sites, *module.start_sites), 4, 0)
    heldout = Batches(source, "heldout", module.sites, 4, 0)
    fit(module, train, heldout, source.weights(), steps, seed=0, work=work, identity="t")
    return module


@pytest.fixture(scope="module")
def teacher(cache, tmp_path_factory: pytest.TempPathFactory):
    return trained(cache, dictionary(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def planted(cache, teacher, tmp_path_factory: pytest.TempPathFactory) -> PlantedSource:
    return PlantedSource(cache, teacher, tmp_path_factory.mktemp("planted"))


def every(source, split: str, sites: Sequence[Site] = SITES) -> Batch:
    return source.read(split, range(source.n_contexts(split)), sites)


def residuals(teacher, batch: Batch) -> torch.Tensor:
    return batch[TARGET] - teacher.reconstruct(batch)[TARGET]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_planted_target_is_the_teachers_prediction_plus_residual_rows_of_one_other_context(split, cache, planted):
    real, null, teacher = every(cache, split), every(planted, split), planted.teacher
    noise, donated = null[TARGET] - teacher.reconstruct(real)[TARGET], residuals(teacher, real)
    donors = [planted.donor(split, c) for c in range(cache.n_contexts(split))]
    assert sorted(donors) == list(range(len(donors)))
    for c, donor in enumerate(donors):
        assert donor != c
        distances = torch.cdist(noise[c, 1:], donated[donor, 1:])
        nearest = distances.argmin(1)
        assert distances.min(1).values.max() < 1e-4
        assert sorted(nearest.tolist()) == list(range(len(nearest))), "every row once"
        assert nearest.tolist() != list(range(len(nearest))), "in another order"


def test_noise_has_the_size_of_the_residual_exactly_and_nothing_else_changes(cache, planted):
    real, null = every(cache, "train"), every(planted, "train")
    noise = null[TARGET] - planted.teacher.reconstruct(real)[TARGET]
    expected = float(residuals(planted.teacher, real)[:, 1:].square().sum())
    assert float(noise[:, 1:].square().sum()) == pytest.approx(expected, rel=1e-4)
    for site in SITES[:2]:
        assert torch.equal(null[site], real[site])
    assert torch.equal(null[TARGET][:, 0], real[TARGET][:, 0])
    assert torch.equal(null.tokens, real.tokens)


def test_a_context_is_planted_alike_at_every_reading_and_in_every_company(cache, teacher, planted, tmp_path):
    together = planted.read("train", [3, 7, 1], SITES)[TARGET]
    anew = PlantedSource(cache, teacher, tmp_path)
    assert torch.equal(anew.read("train", [7], [TARGET])[TARGET][0], together[1])
    assert torch.equal(anew.read("train", [3, 7, 1], SITES)[TARGET], together)
    other = PlantedSource(cache, teacher, tmp_path, seed=1).read("train", [3, 7, 1], SITES)[TARGET]
    assert not torch.allclose(other, together, atol=1e-3)


def test_a_split_is_planted_once_for_all_sources_of_one_home_and_whole_or_not_at_all(
    cache, teacher, tmp_path, monkeypatch
):
    calls, real = [], one_head.planted_target

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(one_head, "planted_target", dies)
    with pytest.raises(KeyboardInterrupt):
        PlantedSource(cache, teacher, tmp_path).read("heldout", [0], SITES)
    assert not list(tmp_path.iterdir())
    first = PlantedSource(cache, teacher, tmp_path).read("heldout", [0, 1], SITES)[TARGET]
    planted_contexts = len(calls)
    second = PlantedSource(cache, teacher, tmp_path).read("heldout", [0, 1], SITES)[TARGET]
    assert torch.equal(first, second)
    assert len(calls) == planted_contexts == 3 + cache.n_contexts("heldout")


def test_sites_that_are_not_planted_need_no_teacher(cache, planted, monkeypatch):
    monkeypatch.setattr(planted.teacher, "encode", None)
    values = planted.read("heldout", [0, 2], [Site(1, "v")])
    assert values.sites.keys() == {Site(1, "v")}
    assert torch.equal(values[Site(1, "v")], cache.read("heldout", [0, 2], [Site(1, "v")])[Site(1, "v")])


class Perfect(PlantedSource):
    """Activations that the teacher predicts without error."""

    def read(self, split, indices, sites, *, device="cpu"):
        needed = tuple(dict.fromkeys((*sites, *self.teacher.sites)))
        batch = self.source.read(split, indices, needed, device=device)
        exact = self.teacher.reconstruct(batch)[self.planted].detach()
        return Batch({site: batch[site] for site in sites} | {self.planted: exact}, batch.mask, batch.tokens)


def test_without_residuals_the_teacher_is_the_truth_and_a_top1_student_comes_close_to_it(cache, teacher, tmp_path):
    perfect = PlantedSource(Perfect(cache, teacher, tmp_path), teacher, tmp_path)
    truth, config = every(perfect, "heldout"), EvaluationConfig(detail_contexts=1)
    assert_close(truth[TARGET][:, 1:], teacher.reconstruct(truth)[TARGET][:, 1:], rtol=1e-4, atol=1e-4)

    def error(module, source) -> float:
        return evaluate(module, Batches(source, "heldout", SITES, 4, 0).all(), config).normalised_mse

    assert error(teacher, perfect) < 1e-6
    student = build(dictionary(), cache.dims)
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter += 0.3 * noise * parameter.abs().mean()
    student.eval()
    before = error(student, perfect)
    student.start_ = lambda *_: None
    fit(student, Batches(perfect, "train", (*SITES, Site(1, "v")), 4, 0), Batches(perfect, "heldout", SITES, 4, 0),
        cache.weights(), TrainingConfig(steps=150, warmup_steps=5), seed=0, work=tmp_path, identity="s")  # fmt: skip
    assert error(student, perfect) < 0.25 * before


@pytest.mark.parametrize(
    "changes", [{"heads_per_feature": "all"}, {"target": "resid_out"}, {"kind": "attn_out_sae", "heads_per_feature": 0}]
)
def test_a_teacher_that_is_no_top1_of_the_attention_output_is_refused(changes, cache, tmp_path):
    if changes.get("kind") == "attn_out_sae":
        config = config_class("attn_out_sae").model_validate(
            {"kind": "attn_out_sae", "layers": [1], "features": 8, "sparsity": {"kind": "topk", "k": 2}}
        )
    else:
        config = dictionary(**changes)
    with pytest.raises(ValueError, match=r"name a Top-1 mtc run with target attn_out in nulls\.teacher"):
        PlantedSource(cache, build(config, cache.dims), tmp_path)


def test_one_context_has_no_other_to_take_residuals_from(cache, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "n_contexts", lambda split: 1)
    with pytest.raises(ValueError, match=r"heldout has one context.*raise corpus"):
        PlantedSource(cache, teacher, tmp_path).read("heldout", [0], SITES)


def test_rows_are_what_frontiers_compare(cache, planted, teacher):
    rows = []
    for series, heads in (("mtc", "all"), ("top1", 1)):
        for name, k, factor in (("a", 6, 1.0), ("b", 12, 0.5)):
            entry = ENTRY | {"series": series, "heads_per_feature": heads, "sparsity": {"kind": "batch_topk", "k": k}}
            run = read_run(f"{series}-{name}", entry, {}, {}, "params.yaml")
            measured = evaluate(teacher, Batches(planted, "heldout", SITES, 4, 0).all(), EvaluationConfig())
            factor *= 0.9 if series == "mtc" else 1.0
            scaled = measured.model_copy(update={
                "l0": float(k), "normalised_mse": factor * measured.normalised_mse,
                "context_squared_error": [factor * e for e in measured.context_squared_error],
            })  # fmt: skip
            rows.append(null_row(run, build(dictionary(heads_per_feature=heads), cache.dims), scaled))
    record = null_record({"teacher": "top1-k6", "teacher_normalised_mse": 0.2, "noise_share": 0.1}, rows)
    assert record["comparisons"]["mtc"]["ratio"] == pytest.approx(0.9)
    assert record["comparisons"]["mtc"]["interval"] == pytest.approx([0.9, 0.9])
    assert (record["comparisons"]["mtc"]["first"], record["comparisons"]["mtc"]["second"]) == ("mtc", "top1")
    assert [row["participation_ratio_mean"] for row in record["rows"]] == pytest.approx([1.0] * 4)
    json.dumps(record, allow_nan=False)


def test_a_run_named_twice_is_refused():
    with pytest.raises(ValueError, match="give each run once"):
        NullConfig(teacher="a", runs=("b", "b"))
