import pytest
import torch

from crosshead.activations.cache import ActivationCache
from crosshead.activations.planted import PlantedConfig, Truth, plant
from crosshead.analysis.recovery import (
    FeatureSet,
    found_moved,
    found_values,
    planted_moved,
    planted_values,
    recovery,
)
from crosshead.dictionaries import mtc, value_sae
from crosshead.dictionaries.sparsity import L1, BatchTopK

FEATURES = 48


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    """A planted pair of layers: (directory, truth)."""
    directory = tmp_path_factory.mktemp("recovery")
    config = PlantedConfig(train_contexts=16, heldout_contexts=4, context_length=16, vocabulary=10, features=FEATURES,
                           mixing=1.0, jitter=0.1, layers=2, shared=1.0, ov_dimensions=(1, 2),
                           sites=("v",))  # fmt: skip
    return directory, plant(config, directory / "planted")


@pytest.fixture(scope="module")
def truth(base) -> Truth:
    return base[1]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scored(truth: Truth, found: FeatureSet, live: torch.Tensor | None = None):
    live = torch.ones(len(found.encoder), dtype=torch.bool) if live is None else live
    return recovery(planted_moved(truth), found, live)


def assert_perfect(score) -> None:
    assert score.share_recovered == 1.0
    for value in (score.cosine_encoder, score.cosine_decoder, score.cosine_loadings, score.adjusted_rand):
        assert value == pytest.approx(1.0, abs=1e-5)
    assert score.heads_error == pytest.approx(0.0, abs=1e-4)
    assert score.ov_dimension_error == pytest.approx(0.0, abs=1e-4)


def module_with_the_truth(truth: Truth) -> mtc.Module:
    module = mtc.Module(mtc.Config(layers=(0,), features=len(truth.feature), sparsity=BatchTopK(k=4), input="resid"),
                        truth.config.dims)  # fmt: skip
    with torch.no_grad():
        module.encoder.weight.copy_(truth.encoder)
        module.decoder.copy_(truth.decoder[0])
        module.loadings.copy_(truth.loadings[0])
    return module


def test_a_module_that_holds_the_truth_scores_one_everywhere(truth):
    assert_perfect(scored(truth, found_moved(module_with_the_truth(truth))))


def test_order_scale_sign_and_idle_features_do_not_matter(truth):
    exact, _, _ = planted_moved(truth)
    n = len(exact.encoder)
    order, scale = torch.randperm(n, generator=generator()), 0.1 + torch.rand(n, 1, generator=generator(1))
    sign = torch.where(torch.rand(n, 1, generator=generator(2)) < 0.5, -1.0, 1.0)
    moved = FeatureSet(exact.encoder * scale, exact.decoder * sign / scale, exact.loadings * sign * 3)
    noise = FeatureSet(*(torch.randn(30, table.shape[1], generator=generator(3)) for table in exact))
    found = FeatureSet(*(torch.cat([a[order], b]) for a, b in zip(moved, noise, strict=True)))
    live = torch.arange(n + 30) < n
    assert_perfect(scored(truth, found, live))


def test_random_features_score_next_to_nothing(truth):
    exact, _, _ = planted_moved(truth)
    random = FeatureSet(*(torch.randn(200, table.shape[1], generator=generator()) for table in exact))
    score = scored(truth, random)
    assert score.share_recovered == 0.0
    assert score.adjusted_rand < 0.15
    assert score.ov_dimension_error > 1.0


@pytest.mark.parametrize("part", FeatureSet._fields)
def test_a_feature_is_recovered_only_with_all_its_parts(truth, part):
    """One of three tables is wrong for half the features; a decoder turned round alone is as wrong as a random one."""
    exact, _, _ = planted_moved(truth)
    half = torch.arange(len(exact.encoder)) % 2 == 0
    table = getattr(exact, part).clone()
    table[half] = -table[half]
    score = scored(truth, exact._replace(**{part: table}))
    assert score.share_recovered == pytest.approx(0.5, abs=0.02)


def test_features_without_a_partner_count_as_missed(truth):
    exact, _, _ = planted_moved(truth)
    n = len(exact.encoder)
    live = torch.arange(n) < n // 4
    score = scored(truth, exact, live)
    assert score.share_recovered == pytest.approx(n // 4 / n)
    assert score.cosine_encoder == 0.0
    nothing = scored(truth, exact, torch.zeros(n, dtype=torch.bool))
    assert nothing.share_recovered == nothing.adjusted_rand == 0.0


def test_heads_per_feature_and_ov_dimension_are_counted(truth):
    """One head instead of many, and atoms that write alike: errors that can be worked out."""
    exact, feature, _ = planted_moved(truth)
    one = torch.nn.functional.one_hot(exact.loadings.abs().argmax(1), exact.loadings.shape[1]).float()
    squares = exact.loadings.square()
    expected = (squares.sum(1).square() / squares.square().sum(1) - 1).mean()
    assert scored(truth, exact._replace(loadings=one)).heads_error == pytest.approx(float(expected), rel=1e-4)

    alike = exact.decoder.clone()
    for i in feature.unique():
        alike[feature == i] = alike[feature == i][0]
    ranks = []
    for i in feature.unique():
        rows = torch.nn.functional.normalize(exact.decoder[feature == i], dim=1)
        power = torch.linalg.svdvals(rows).square()
        ranks.append(float(power.sum() ** 2 / power.square().sum()))
    expected = sum(rank - 1 for rank in ranks) / len(ranks)
    assert scored(truth, exact._replace(decoder=alike)).ov_dimension_error == pytest.approx(expected, abs=1e-4)
    assert expected > 0.2


def test_a_value_sae_that_holds_the_planted_values_scores_one(base):
    directory, truth = base
    weights = ActivationCache.open(directory / "planted" / "cache").weights()
    module = value_sae.Module(value_sae.Config(layers=(0, 1), features=len(truth.feature), sparsity=L1(coefficient=1)),
                              truth.config.dims)  # fmt: skip
    module.scales.copy_(torch.tensor([0.5, 2.0]))
    parts = []
    for layer, scale in enumerate((0.5, 2.0)):
        for h in range(6):
            moved = truth.loadings[layer][h + 1, :, None] * truth.decoder[layer]
            parts.append(scale * moved @ weights[layer].W_O[h].T)
    with torch.no_grad():
        module.decoder.copy_(torch.cat(parts, 1))
        module.encoder.weight.copy_(torch.cat(parts, 1))
    score = recovery(planted_values(truth, weights, module), found_values(module), torch.ones(len(truth.feature)) > 0)
    assert score.share_recovered == 1.0
    assert score.heads_error == pytest.approx(0.0, abs=1e-4)
    planted, found, live = planted_values(truth, weights, module), found_values(module), score.n_found * [True]
    others = found._replace(encoder=torch.randn(found.encoder.shape, generator=generator()))
    assert recovery(planted, others, torch.tensor(live)).share_recovered == 0.0
    assert recovery(planted, others, torch.tensor(live), by_encoders=False).share_recovered == 1.0
    half = torch.arange(len(truth.feature))[:, None] % 2 == 0
    wrong = found._replace(decoder=torch.where(half, others.encoder, found.decoder))
    assert recovery(planted, wrong, torch.tensor(live), by_encoders=False).share_recovered == pytest.approx(
        0.5, abs=0.02
    )


def test_tables_that_do_not_fit_are_refused(truth):
    exact, _, _ = planted_moved(truth)
    with pytest.raises(ValueError, match="the true loadings is 7 wide, the found one 6"):
        scored(truth, exact._replace(loadings=exact.loadings[:, 1:]))
