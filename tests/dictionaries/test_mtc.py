import pytest
import torch
from torch.testing import assert_close

from crosshead.dictionaries.base import Site
from crosshead.dictionaries.registry import build, config_class
from tests.dictionaries.cases import DIMS, config_of, random_batch, weights
from tests.dictionaries.test_contract import started


def dense_prediction(module, batch):
    """The definition, feature by feature: build every P_i and sum g_i(t) d_i."""
    codes = module.encode(batch).to_dense().view(*batch.mask.shape, -1)
    pattern = batch[Site(2, "pattern")]
    loadings = module.effective_loadings()
    eye = torch.eye(pattern.shape[-1])
    y = torch.einsum("bht,hd->btd", pattern[..., 0], module.bos) + module.decoder_bias
    for i in range(module.config.features):
        feature_pattern = torch.einsum("h,bhts->bts", loadings[1:, i], pattern) + loadings[0, i] * eye
        y = y + (feature_pattern @ codes[..., i, None]) * module.decoder[i]
    return y


@pytest.mark.parametrize("case", ["mtc/l1", "mtc/batch_topk", "mtc-top1/topk", "mtc-resid/jumprelu"])
def test_prediction_is_the_sum_over_feature_patterns(case):
    module, (batch, *_) = started(case)
    assert_close(module.decode(module.encode(batch), batch), dense_prediction(module, batch), rtol=1e-4, atol=1e-5)


def test_head_patterns_with_unit_loading_on_one_head_are_that_heads_pattern():
    module, (batch, *_) = started("mtc-top1/topk")
    with torch.no_grad():
        module.loadings.zero_()
        module.loadings[3] = 1.0
    expected = batch[Site(2, "pattern")][:, 2] * batch.mask[:, None, :]
    assert_close(module.pattern(batch, 0), expected)


def test_query_side_is_the_pattern_applied_to_the_key_side():
    module, (batch, *_) = started("mtc/topk")
    moved = module.query_side(batch, [3, 5])
    key_side = module.key_side(batch, [3, 5])
    assert_close(moved[..., 1], (module.pattern(batch, 5) @ key_side[..., 1, None])[..., 0])


def test_top1_keeps_one_mover_per_feature_and_m_heads_keep_m():
    for case, kept in (("mtc-top1/topk", 1), ("mtc-top2-nonnegative/topk", 2), ("mtc-fixed-l2/topk", 1)):
        module, _ = started(case)
        assert (module.effective_loadings() != 0).sum(0).max() == kept


def test_all_movers_are_alive_at_the_start_of_training_and_the_kept_ones_at_its_end():
    module, _ = started("mtc-top1/topk")
    assert (module.effective_loadings(0.0) != 0).all()
    assert ((module.effective_loadings(1.0) != 0).sum(0) == 1).all()


def test_the_penalty_norm_is_neutral_to_splitting_a_load_over_equal_patterns():
    module, _ = started("mtc/l1")
    with torch.no_grad():
        module.pattern_gram.fill_(1.0)  # all movers have the same pattern
        module.loadings.zero_()
        module.loadings[1, 0], module.loadings[1, 1], module.loadings[2, 1] = 1.0, 0.5, 0.5
        module.decoder[:2] = 1.0
    norms = module.feature_norms()
    assert_close(norms[0], norms[1])


def test_contributions_are_brute_force_moved_energies():
    module, (batch, *_) = started("mtc/topk")
    feature, head = 4, 1
    f = module.key_side(batch, [feature])
    moved = module.effective_loadings()[head + 1, feature] * (batch[Site(2, "pattern")][:, head] @ f)
    assert_close(module.contributions(batch)[head + 1, feature], moved[..., 0][batch.mask].square().sum())


def test_the_start_learns_what_a_constant_first_value_contributes():
    batches = [random_batch(seed, n_contexts=12) for seed in range(4)]
    for batch in batches:  # the target is the beginning-of-text term alone, the same value in every context
        first = batch[Site(2, "pattern")][..., 0]
        batch.sites[Site(2, "attn_out")].copy_(torch.einsum("bht,hd->btd", first, torch.ones(4, 12).cumsum(0)))
    module = build(config_of("mtc/topk"), DIMS)
    module.train()
    module.start_(batches, weights(), torch.Generator().manual_seed(0))
    codes = module.encode(batches[0])
    silent = module.decode(codes.with_values(torch.zeros_like(codes.values)), batches[0])
    assert_close(silent[:, 1:], module.target(batches[0])[:, 1:], rtol=1e-2, atol=1e-2)


def test_fixed_assignment_with_many_heads_is_refused():
    with pytest.raises(ValueError, match=r"assignment: fixed binds a feature to one mover"):
        config_class("mtc").model_validate(
            {"kind": "mtc", "layers": [2], "features": 8, "assignment": "fixed", "sparsity": {"kind": "topk", "k": 2}}
        )


def test_a_choice_of_movers_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match=r"selection begins at 0.5 and ends at 0.4; it has to end later"):
        config_class("mtc").model_validate(
            {"kind": "mtc", "layers": [2], "features": 8, "selection": [0.5, 0.4], "sparsity": {"kind": "topk", "k": 2}}
        )


def test_more_heads_per_feature_than_movers_is_refused():
    config = config_class("mtc").model_validate(
        {"kind": "mtc", "layers": [2], "features": 8, "heads_per_feature": 6, "sparsity": {"kind": "topk", "k": 2}}
    )
    with pytest.raises(ValueError, match=r"heads_per_feature=6 exceeds the 5 movers"):
        build(config, DIMS)


def test_moved_counts_are_brute_force_counts():
    module, (batch, *_) = started("mtc/topk")
    features = range(module.config.features)
    size, limit = module.decoder.norm(dim=1), 0.01 * module.target(batch).norm(dim=-1)
    moved = module.query_side(batch, features).abs() * size
    query = int((moved > limit[..., None])[batch.mask].sum())
    triples = 0
    f = module.key_side(batch, features)
    for i in features:
        parts = module.pattern(batch, i).abs() * f[:, None, :, i] * size[i]
        triples += int((parts > limit[..., None])[batch.mask].sum())
    assert module.moved_counts(batch) == (query, triples)
