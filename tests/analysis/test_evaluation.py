import pytest
import torch

from crosshead.analysis.evaluation import EvaluationConfig, evaluate
from crosshead.dictionaries.base import Batch
from tests.dictionaries.cases import random_batch
from tests.dictionaries.test_contract import started

CONFIG = EvaluationConfig(detail_contexts=3)  # no multiple of a batch


def ready(case: str):
    module, batches = started(case)
    module.calibrate_(batches)
    return module.eval(), [random_batch(seed) for seed in (10, 11, 12)]


def joined(batches: list[Batch]) -> Batch:
    sites = {site: torch.cat([b.sites[site] for b in batches]) for site in batches[0].sites}
    return Batch(sites, torch.cat([b.mask for b in batches]), torch.cat([b.tokens for b in batches]))


@pytest.mark.parametrize("case", ["mtc/batch_topk", "value_sae-two/l1", "attn_out_sae/topk"])
def test_results_do_not_depend_on_how_contexts_are_batched(case):
    module, batches = ready(case)
    one, many = evaluate(module, [joined(batches)], CONFIG), evaluate(module, batches, CONFIG)
    names = (
        "l0",
        "l1",
        "normalised_mse",
        "normalised_mse_refit",
        "shrinkage",
        "dead_fraction",
        "l0_query",
        "l0_triples",
    )
    for name in (name for name in names if getattr(one, name) is not None):
        assert getattr(one, name) == pytest.approx(getattr(many, name), rel=1e-5), name
    assert one.feature_counts == many.feature_counts
    assert one.n_tokens_detail == many.n_tokens_detail
    if one.superposition is not None:
        assert one.superposition.model_dump() == pytest.approx(many.superposition.model_dump(), rel=1e-4)


def test_normalised_mse_is_the_ratio_of_sums_over_counted_positions():
    module, batches = ready("mtc/l1")
    result = evaluate(module, batches, CONFIG)
    with torch.no_grad():
        targets = torch.cat([module.target(b)[b.mask] for b in batches])
        predictions = torch.cat([module.decode(module.encode(b), b)[b.mask] for b in batches])
    assert result.normalised_mse == pytest.approx(
        float((targets - predictions).square().sum() / targets.square().sum())
    )
    assert result.n_tokens == len(targets)
    scale = float((targets * predictions).sum() / predictions.square().sum())
    refitted = float((targets - scale * predictions).square().sum() / targets.square().sum())
    assert result.shrinkage == pytest.approx(scale, rel=1e-5)
    assert result.normalised_mse_refit == pytest.approx(refitted, rel=1e-4)
    assert sum(result.context_squared_error) / sum(result.context_variance) == pytest.approx(result.normalised_mse)


def test_layers_add_up_in_a_two_layer_dictionary():
    module, batches = ready("value_sae-two/topk")
    result = evaluate(module, batches, CONFIG)
    assert [s.site for s in result.sites] == ["2.v", "4.v"]
    assert sum(s.squared_error for s in result.sites) == pytest.approx(sum(result.context_squared_error))
    assert sum(s.variance for s in result.sites) == pytest.approx(sum(result.context_variance))


def test_dead_features_are_those_that_never_fire_here():
    module, batches = ready("value_sae-one/l1")
    with torch.no_grad():
        module.encoder.bias[:6] = -1e6
    result = evaluate(module, batches, CONFIG)
    assert result.feature_counts[:6] == [0] * 6
    assert result.dead_fraction >= 6 / 24
    assert sum(result.density_histogram) == sum(n > 0 for n in result.feature_counts)


def test_a_top1_dictionary_uses_one_head_and_a_spread_one_more():
    module, batches = ready("mtc-top1/topk")
    assert evaluate(module, batches, CONFIG).superposition.participation_ratio_mean == pytest.approx(1.0)
    with torch.no_grad():
        module, batches = ready("mtc/topk")
        module.loadings.fill_(0.5)
    spread = evaluate(module, batches, CONFIG).superposition
    assert spread.participation_ratio_mean > 1.5
    assert 0 < spread.identity_share < 1


def test_the_identity_share_counts_what_is_written_whatever_the_gauge():
    module, batches = ready("mtc-top1/topk")
    with torch.no_grad():
        module.loadings.zero_()
        module.loadings[0, :12] = 1.0
        module.loadings[1, 12:] = 1.0
        result = evaluate(module, batches, CONFIG)
        detail = EvaluationConfig(detail_contexts=1)
        written = torch.zeros(2)
        batch = batches[0]
        first = Batch({site: x[:1] for site, x in batch.sites.items()}, batch.mask[:1], batch.tokens[:1])
        codes = module.encode(first)
        base = module.decode(codes.with_values(torch.zeros_like(codes.values)), first)
        for i in range(24):
            own = module.decode(codes.with_values(codes.values * (codes.columns == i)), first) - base
            written[int(i >= 12)] += own[first.mask].square().sum()
        measured = evaluate(module, [first], detail).superposition
        assert measured.identity_share == pytest.approx(float(written[0] / written.sum()), rel=1e-4)
        # The same function in another gauge: decoders of the identity's features grow, their loadings shrink.
        module.decoder[:12] *= 10
        module.loadings[0, :12] /= 10
        again = evaluate(module, batches, CONFIG)
    assert again.superposition.identity_share == pytest.approx(result.superposition.identity_share, rel=1e-4)


def test_only_dictionaries_that_move_features_have_query_side_counts():
    module, batches = ready("attn_out_sae/topk")
    result = evaluate(module, batches, CONFIG)
    assert result.l0_query is None
    assert result.superposition is None


def test_no_held_out_positions_is_an_error():
    module, _ = ready("attn_out_sae/topk")
    with pytest.raises(ValueError, match=r"no held-out positions .* raise corpus\.heldout_contexts"):
        evaluate(module, [], CONFIG)
