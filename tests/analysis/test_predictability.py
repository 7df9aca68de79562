import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from crosshead.analysis.predictability import (
    Firings,
    PredictabilityConfig,
    average_precision,
    ngram_probabilities,
    observe,
    predictability,
)
from tests.analysis.test_evaluation import ready

CONFIG = PredictabilityConfig(minimum_firings=5, smoothing=1.0)


def stream(seed: int, n: int = 4000, vocabulary: int = 20) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(1, vocabulary, size=n + 1)
    return tokens[1:], tokens[:-1]


def firings(seed: int, rule) -> Firings:
    tokens, previous = stream(seed)
    fires = rule(tokens, previous, np.random.default_rng(seed + 100))
    strength = 0.5 + np.random.default_rng(seed + 200).random(len(tokens))
    return Firings(tokens, previous, (fires * strength)[:, None].astype(float))


def scored(rule):
    result = predictability(firings(0, rule), firings(1, rule), CONFIG, 0)
    assert result is not None
    return result


def test_a_feature_of_one_token_is_predictable_and_its_shuffle_is_not():
    result = scored(lambda token, previous, draw: token == 3)
    assert result["median"] == pytest.approx(1.0)
    assert result["bits"]["median"] > 0.97
    assert result["top"]["median"] == result["middle"]["median"] == pytest.approx(1.0)
    assert result["shuffled"] < 3 * result["base_rate"]
    assert result["bits"]["shuffled"] < 0.02
    assert result["interval"] == [pytest.approx(1.0), pytest.approx(1.0)]


def test_a_feature_of_one_bigram_needs_the_previous_token():
    result = scored(lambda token, previous, draw: (token == 3) & (previous < 6))
    assert result["median"] == pytest.approx(1.0, abs=0.02)
    assert result["bits"]["median"] > 0.8


def test_a_random_feature_is_predicted_no_better_than_by_its_rate():
    result = scored(lambda token, previous, draw: draw.random(len(token)) < 0.1)
    assert result["median"] == pytest.approx(result["base_rate"], abs=0.03)
    assert result["bits"]["median"] < 0.01


def test_a_feature_that_means_a_token_at_its_top_only_loses_in_the_middle():
    tokens, previous = stream(0)
    other_tokens, other_previous = stream(1)

    def activity(token, seed):
        noise = (np.random.default_rng(seed).random(len(token)) < 0.15) * 1.0
        return np.where(token == 3, 10.0, noise)[:, None]

    fit, held = Firings(tokens, previous, activity(tokens, 2)), Firings(other_tokens, other_previous,
                                                                       activity(other_tokens, 3))  # fmt: skip
    result = predictability(fit, held, CONFIG, 0)
    assert result["top"]["median"] > 0.95
    assert result["middle"]["median"] < 0.3


def test_counts_back_off_from_bigram_to_token_to_base_rate():
    fit = Firings(np.array([5, 5, 6, 5]), np.array([1, 1, 1, 2]), np.array([[1.0], [0.0], [1.0], [1.0]]))
    held = Firings(np.array([5, 6, 9]), np.array([1, 7, 1]), np.zeros((3, 1)))
    probability, base = ngram_probabilities(fit, held, smoothing=2.0)
    assert base[0] == pytest.approx(3.5 / 5)
    five = (2 + 2 * base[0]) / (3 + 2)
    six = (1 + 2 * base[0]) / (1 + 2)
    assert probability[:, 0] == pytest.approx([(1 + 2 * five) / (2 + 2), six, base[0]])


def test_average_precision_equals_that_of_scikit_learn_ties_and_all():
    generator = np.random.default_rng(0)
    for levels in (3, 50):
        scores, hits = generator.integers(levels, size=300) / levels, generator.random(300) < 0.2
        expected = average_precision_score(hits, scores)
        assert average_precision(scores, hits.astype(float), 1.0 - hits) == pytest.approx(expected)
    assert np.isnan(average_precision(scores, np.zeros(300), np.ones(300)))


def test_features_that_fire_too_rarely_are_left_out():
    nothing = firings(0, lambda token, previous, draw: token == 99)
    assert predictability(nothing, nothing, CONFIG, 0) is None


def test_activity_is_read_at_counted_positions():
    module, batches = ready("mtc/topk")
    chosen = [2, 5, 7]
    found = observe(module, batches, chosen)["from"]
    dense = torch.cat([module.key_side(b, chosen)[b.mask] for b in batches])
    np.testing.assert_allclose(found.activity, dense.double(), rtol=1e-6)
    assert found.tokens.tolist() == torch.cat([b.tokens[b.mask] for b in batches]).tolist()
    assert found.previous[0] == batches[0].tokens[0, 0]


def test_a_feature_is_moved_to_where_it_writes_more_than_a_hundredth():
    module, batches = ready("mtc/topk")
    chosen = [1, 3, 8, 20]
    found = observe(module, batches, chosen)["to"]
    with torch.no_grad():
        g = torch.cat([module.query_side(b, chosen)[b.mask] for b in batches])
        target = torch.cat([module.target(b)[b.mask] for b in batches]).norm(dim=-1)
        share = g.abs() * module.decoder[chosen].norm(dim=1) / target[:, None]
    np.testing.assert_allclose(found.activity, share * (share > 0.01), rtol=1e-3, atol=1e-5)
