from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from crosshead.analysis.explaining import Decision, _others, explained_decision
from crosshead.analysis.qk_contributions import contributions
from crosshead.analysis.qk_explain import compare_deletion, deleted_pattern, explain_attention
from tests.analysis.qk import trained

TEXT = "abcab cab abc"


@pytest.fixture(scope="module", params=[{}, {"rank": 2}, {"base": "mean", "heads": "all"}, {"position": "content"}])
def setup(request, tiny_model):
    model = tiny_model("llama")
    return model, *trained(model, **request.param)


def test_contributions_sum_to_the_predicted_scores(setup):
    _, module, heldout = setup
    batch, found = heldout[0], contributions(module, heldout[0])
    base = module.base_scores(batch) if module.config.base == "mean" else torch.zeros(())
    features = (module.scores(batch) - base)[0].permute(1, 2, 0)
    total = sum(found.of_feature(0, i) for i in range(module.config.features))
    lower = torch.ones(features.shape[:2], dtype=torch.bool).tril()
    lower[:, 0] = lower[0] = False
    assert_close(total[lower], features[lower], rtol=1e-3, atol=1e-4)
    row = found.at_query(0, 9, 1).sum(0)
    assert_close(row[1:10], features[9, 1:10, 1], rtol=1e-3, atol=1e-4)


def test_pairs_and_base_sum_to_the_predicted_score_and_the_error_is_what_is_left(setup):
    model, module, _ = setup
    found = explain_attention(module, model, TEXT, head=2)
    assert sum(pair.contribution for pair in found.pairs) + found.base == pytest.approx(found.predicted, abs=1e-3)
    assert found.predicted + found.error == pytest.approx(found.score, abs=1e-5)
    assert [p.contribution for p in found.pairs] == sorted((p.contribution for p in found.pairs), reverse=True)
    if module.config.base == "none":
        assert found.base == pytest.approx(0.0, abs=1e-4)
    own = module.true_scores(found.batch)[0, module.heads.tolist().index(2), found.query]
    assert found.score == pytest.approx(float(own[found.key] - own[1 : found.query + 1].mean()), abs=1e-4)
    assert f"attends to {found.tokens[found.key]!r}" in found.table()


def test_deleting_the_pairs_changes_the_running_models_pattern_as_predicted(setup):
    model, module, _ = setup
    found = explain_attention(module, model, TEXT, head=1, query=-2)
    features = [pair.feature for pair in found.pairs[:3]]
    pattern, logits = deleted_pattern(module, model, found, features)
    assert_close(pattern, found.predicted_after(module, features), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(pattern, found.pattern, atol=1e-4)
    untouched, clean = deleted_pattern(module, model, found, [])
    assert_close(untouched, found.pattern, rtol=1e-3, atol=1e-5)
    earlier = slice(0, found.query)
    assert_close(logits[earlier], clean[earlier], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits[found.query], clean[found.query], atol=1e-4)


def test_features_alone_predict_a_deletion_from_their_own_scores(setup):
    """Against a softmax by hand of the module's scores less what these features write, pair by pair."""
    model, module, _ = setup
    found = explain_attention(module, model, TEXT, head=1, query=-2)
    features, query = [pair.feature for pair in found.pairs[:3]], found.query
    g, each = module.heads.tolist().index(1), contributions(module, found.batch)
    rest = module.scores(found.batch)[0, g, query, : query + 1].detach().clone()
    rest[1:] -= sum(each.of_feature(0, i)[query, 1 : query + 1, g] for i in features)
    rest[0] -= found.written[features, 0].sum()
    expected = torch.cat([rest.softmax(0), torch.zeros(len(found.tokens) - query - 1)])
    alone = found.features_pattern(module, features)
    assert_close(alone, expected, rtol=1e-3, atol=1e-5)
    assert_close(found.features_pattern(module, []), found.predicted_pattern, rtol=1e-4, atol=1e-6)
    after, key = deleted_pattern(module, model, found, features)[0], found.key
    compared = compare_deletion(module, found, features, after)
    assert compared.attention_after == pytest.approx(float(expected[key]), abs=1e-4)
    assert compared.fall == pytest.approx(float(found.predicted_pattern[key] - expected[key]), abs=1e-4)
    assert compared.model_fall == pytest.approx(float(found.pattern[key] - after[key]), abs=1e-6)
    for distance, (one, other) in ((compared.distance, (expected, after)),
                                   (compared.distance_before, (found.predicted_pattern, found.pattern)),
                                   (compared.model_distance, (found.pattern, after))):  # fmt: skip
        assert distance == pytest.approx(float((one - other).clamp(min=0).sum()), abs=1e-4)
    assert compared.distance > 0.01, "a prediction, not the same subtraction twice"


def test_features_without_error_predict_the_model_and_their_error_is_what_separates_them(setup):
    """Where the real scores were the predicted ones, both predictions are one; a constant per query changes nothing."""
    model, module, _ = setup
    found = explain_attention(module, model, TEXT, head=2)
    features = [pair.feature for pair in found.pairs[:2]]
    exact = replace(found, scores=found.predicted_scores + 1.5, pattern=found.predicted_pattern)
    compared = compare_deletion(module, exact, features, exact.predicted_after(module, features))
    assert compared.distance == pytest.approx(0.0, abs=1e-5)
    assert compared.fall == pytest.approx(compared.model_fall, abs=1e-5)
    assert compared.model_distance > 1e-4


def test_the_record_says_which_prediction_is_which(setup):
    model, module, _ = setup
    record = explained_decision(module, model, Decision(text=TEXT, head=1), top=3)
    alone = record["predicted_from_features_alone"]
    assert record["deletion_difference"] < 1e-4  # the same arithmetic
    assert alone["fall"] == pytest.approx(record["attention_predicted"] - alone["attention_after"], abs=1e-6)
    assert alone["model_fall"] == pytest.approx(record["attention"] - record["attention_after"], abs=1e-6)
    [own] = [key for key in record["strongest_keys"] if key["position"] == record["key"]]
    assert (own["attention_after"], own["predicted_after"]) == (record["attention_after"], alone["attention_after"])


def test_the_first_keys_score_is_explained_too(setup):
    """Deleting everything leaves what no feature says: the error of every key."""
    model, module, _ = setup
    found = explain_attention(module, model, TEXT, head=1)
    everything = list(range(module.config.features))
    rest = found.scores - found.written.sum(0)
    expected = rest[: found.query + 1].softmax(0)
    assert_close(found.predicted_after(module, everything)[: found.query + 1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"head": 0, "query": -1}, "not among the heads"),
    ({"head": 1, "query": 99}, "query 99 is out of range"),
    ({"head": 1, "query": 3, "key": 7}, "position 7 is no key of query 3"),
])  # fmt: skip
def test_wrong_questions_are_refused(arguments, message, tiny_model):
    model = tiny_model("llama")
    module, _ = trained(model, steps=1)
    with pytest.raises(ValueError, match=message):
        explain_attention(module, model, TEXT, **arguments)


def test_a_pair_that_writes_at_other_keys_only_is_marked(setup):
    model, module, _ = setup
    found = explain_attention(module, model, TEXT, head=1)
    written = found.written[[pair.feature for pair in found.pairs], found.key]
    assert [pair.by_centring for pair in found.pairs] == (written == 0).tolist()
    assert ("by centring" in found.table(99)) == any(pair.by_centring for pair in found.pairs)


def test_the_control_deletes_as_many_others(setup):
    model, module, _ = setup
    found = explain_attention(module, model, TEXT, head=1)
    deleted = [found.pairs[0].feature]
    others = _others(found, deleted)
    assert others is not None
    assert len(others) == 1
    assert not set(others) & set(deleted)
    assert _others(found, [pair.feature for pair in found.pairs]) is None
