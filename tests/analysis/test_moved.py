import numpy as np
import pytest
import torch

from crosshead.activations.survey import position_kinds
from crosshead.analysis.moved import moved
from crosshead.analysis.movers import mover_of
from crosshead.analysis.relations import POSITIONAL
from crosshead.dictionaries.base import Batch, Site
from tests.analysis.test_evaluation import ready
from tests.dictionaries.cases import padded_batch, weights


def batch_of(seed: int) -> Batch:
    """A padded batch over few tokens, so that relations occur."""
    batch = padded_batch(seed)
    generator = torch.Generator().manual_seed(seed)
    return Batch(batch.sites, batch.mask, torch.randint(1, 4, batch.tokens.shape, generator=generator))


BATCHES = [batch_of(30), batch_of(31)]


def even(tokens: torch.Tensor) -> torch.Tensor:
    return tokens % 2 == 0


def measure(case: str, **options):
    module, _ = ready(case)
    return module, moved(mover_of(module, weights()), BATCHES, delimiter=even, **options)


def dense_masses(module, batch: Batch) -> torch.Tensor:
    """|P_i(t, s)| f_i(s) ||d_i|| at counted t, the whole [B, T, T, F] tensor."""
    loadings, pattern = module.effective_loadings(), batch[Site(2, "pattern")]
    f = module.encode(batch).to_dense().view(*batch.mask.shape, -1)
    moved_by = torch.einsum("hf,bhts->btsf", loadings[1:], pattern)
    moved_by += torch.eye(pattern.shape[-1])[None, :, :, None] * loadings[0]
    return (moved_by * f[:, None] * module.decoder.norm(dim=1)) * batch.mask[:, :, None, None]


def dense_kinds(batch: Batch) -> dict[str, torch.Tensor]:
    allowed = batch.mask[:, :, None] & batch.mask[:, None, :]
    kinds = {name: kind & allowed for name, kind in position_kinds(batch.tokens).items()}
    n_positions = batch.mask.shape[1]
    earlier = torch.ones(n_positions, n_positions, dtype=torch.bool).tril()
    kinds["same_position"] = torch.eye(n_positions, dtype=torch.bool) & allowed
    kinds["delimiter"] = even(batch.tokens)[:, None, :] & allowed & earlier
    kinds["other"] = allowed & earlier & ~torch.stack([kinds[name] for name in POSITIONAL]).any(0)
    return kinds


@pytest.mark.parametrize("case", ["mtc/topk", "mtc-top1/l1", "mtc-resid/batch_topk"])
@torch.no_grad()
def test_sums_equal_those_of_the_dense_tensor(case):
    module, found = measure(case)
    masses = [dense_masses(module, batch) for batch in BATCHES]
    np.testing.assert_allclose(found.mass, sum(m.abs().sum((0, 1, 2)) for m in masses), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.power, sum(m.sum(2).square().sum((0, 1)) for m in masses), rtol=1e-4, atol=1e-7)
    per_context = torch.cat([m.abs().sum((1, 2)) for m in masses])
    np.testing.assert_allclose(found.context_mass, per_context, rtol=1e-4, atol=1e-7)
    for name in (*POSITIONAL, "delimiter", "other"):
        within, possible, expected = (0.0, 0.0, 0.0)
        for m, batch in zip(masses, BATCHES, strict=True):
            kind = dense_kinds(batch)[name]
            n_keys = (batch.mask.cumsum(1)).clamp(min=1)
            by_query = m.abs().sum(2)
            within = within + (m.abs() * kind[..., None]).sum((0, 1, 2))
            possible = possible + (by_query * kind.any(2)[..., None]).sum((0, 1))
            expected = expected + (by_query * (kind.sum(2) / n_keys)[..., None]).sum((0, 1))
        live = possible > 0
        np.testing.assert_allclose(found.share(name)[live], (within / possible)[live], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.expected_share(name)[live], (expected / possible)[live], rtol=1e-4, atol=1e-6)
        assert np.isnan(found.share(name)[~live]).all()


@torch.no_grad()
def test_the_pooled_share_is_that_of_the_summed_mass():
    module, found = measure("mtc/topk")
    chosen = np.arange(24) < 10
    within = possible = 0.0
    for batch in BATCHES:
        masses, kind = dense_masses(module, batch).abs()[..., :10], dense_kinds(batch)["duplicate_token"]
        within += float((masses * kind[..., None]).sum())
        possible += float((masses.sum(2) * kind.any(2)[..., None]).sum())
    assert found.pooled_share("duplicate_token", chosen) == pytest.approx(within / possible, rel=1e-4)
    assert found.pooled_share("duplicate_token", np.zeros(24, dtype=bool)) is None


@torch.no_grad()
def test_breadth_is_the_mean_entropy_of_sources():
    module, found = measure("mtc/topk")
    masses = torch.cat([dense_masses(module, batch).abs() for batch in BATCHES]).double()
    by_query = masses.sum(2, keepdim=True)
    p = masses / by_query.clamp(min=1e-300)
    entropy = -(torch.special.xlogy(p, p)).sum(2)
    mean = (entropy * by_query[:, :, 0]).sum((0, 1)) / masses.sum((0, 1, 2)).clamp(min=1e-300)
    live = found.mass > 0
    np.testing.assert_allclose(found.breadth()[live], mean.exp()[live], rtol=1e-4)


@torch.no_grad()
def test_mass_through_a_mover_is_what_it_would_move_alone():
    module, found = measure("mtc/topk")
    loadings, size = module.effective_loadings(), module.decoder.norm(dim=1)
    expected = torch.zeros(24, 5)
    for batch in BATCHES:
        f = module.encode(batch).to_dense().view(*batch.mask.shape, -1)
        expected[:, 0] += (f * batch.mask[..., None]).sum((0, 1)) * loadings[0].abs() * size
        for h in range(4):
            per_query = batch[Site(2, "pattern")][:, h] @ f
            expected[:, h + 1] += (per_query * batch.mask[..., None]).sum((0, 1)) * loadings[h + 1].abs() * size
    np.testing.assert_allclose(found.through, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_skip_trigram_share_is_the_unpositional_mass_from_the_commonest_key():
    module, found = measure("mtc/topk")
    by_token = torch.zeros(2, 4, 24, dtype=torch.float64)
    for batch in BATCHES:
        m = dense_masses(module, batch).abs().double()
        other = m * dense_kinds(batch)["other"][..., None]
        for token in range(1, 4):
            keys = (batch.tokens == token)[:, None, :, None]
            by_token[0, token] += (m * keys).sum((0, 1, 2))
            by_token[1, token] += (other * keys).sum((0, 1, 2))
    best = by_token[0].argmax(0)
    expected = by_token[1, best, torch.arange(24)] / by_token[0].sum(0)
    live = found.mass > 0
    np.testing.assert_allclose(found.skip_trigram_share()[live], expected[live], rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_entries_hold_every_active_feature_with_its_largest_move():
    module, found = measure("mtc/batch_topk")
    dense = torch.cat([module.encode(b).to_dense().view(*b.mask.shape, -1) for b in BATCHES])
    masses = torch.cat([dense_masses(module, b).abs() for b in BATCHES])
    entries = found.entries
    assert len(entries.feature) == int((dense != 0).sum())
    torch.testing.assert_close(dense[entries.context, entries.anchor, entries.feature], entries.value)
    torch.testing.assert_close(masses.sum(1)[entries.context, entries.anchor, entries.feature], entries.mass)
    largest = masses.amax(1)[entries.context, entries.anchor, entries.feature]
    torch.testing.assert_close(masses[entries.context, entries.partner, entries.anchor, entries.feature], largest)
    assert found.firings.tolist() == (dense != 0).sum((0, 1)).tolist()


def with_patterns(batch: Batch, pattern: torch.Tensor) -> Batch:
    return Batch(dict(batch.sites) | {Site(2, "pattern"): pattern}, batch.mask, batch.tokens)


@torch.no_grad()
def test_a_head_that_only_looks_back_gives_exact_shares():
    """Head 0 looks at the previous token, head 1 at the query itself, head 2 half and half; nothing else moves."""
    module, _ = ready("mtc/topk")
    batch = padded_batch(40)
    mask = torch.ones_like(batch.mask)
    mask[:, 0] = False
    n_positions = mask.shape[1]
    back, stay = torch.eye(n_positions).roll(-1, 1).tril(-1), torch.eye(n_positions)
    heads = torch.stack([back, stay, (back + stay) / 2, stay])
    tokens = torch.arange(n_positions).expand_as(batch.tokens) + 1  # nothing repeats
    whole = Batch(batch.sites, mask, tokens)
    module.loadings.zero_()
    for feature in range(24):
        module.loadings[1 + feature % 3, feature] = 2.0
    found = moved(mover_of(module, weights()), [with_patterns(whole, heads.expand(len(mask), -1, -1, -1))],
                  delimiter=even)  # fmt: skip
    live = found.mass.numpy() > 0
    feature = np.arange(24)
    assert found.share("previous_token")[live & (feature % 3 == 0)] == pytest.approx(1.0)
    assert np.nan_to_num(found.share("previous_token")[live & (feature % 3 == 1)]) == pytest.approx(0.0)
    assert found.share("same_position")[live & (feature % 3 == 1)] == pytest.approx(1.0)
    assert found.breadth()[live & (feature % 3 == 1)] == pytest.approx(1.0)
    assert np.isnan(found.share("induction")).all()
    assert (found.firings.numpy() > 0).any()


# ---- the other architectures ----


@pytest.mark.parametrize("case", ["attn_out_sae/topk", "attn_out_sae-heads/l1"])
@torch.no_grad()
def test_attributions_to_heads_and_keys_add_up_to_the_pre_activation(case):
    module, _ = ready(case)
    mover = mover_of(module, weights())
    batch = batch_of(30)
    pattern, v = batch[Site(2, "pattern")], batch[Site(2, "v")].repeat_interleave(2, dim=1)
    split = torch.einsum("bhts,bhse,fhe->bthsf", pattern, v, mover.readers)
    bias = 0.0 if module.config.per_head else weights()[2].b_O
    constant = (bias - module.means) * module.column_scales @ module.encoder.weight.T + module.encoder.bias
    pre = split.sum((2, 3)) + constant
    x = module._inputs(batch) @ module.encoder.weight.T + module.encoder.bias
    torch.testing.assert_close(pre[batch.mask], x[batch.mask.flatten()], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["attn_out_sae/topk", "attn_out_sae-heads/l1"])
@torch.no_grad()
def test_query_side_mass_is_shared_out_over_keys_by_their_positive_attributions(case):
    module, found = measure(case)
    mover = found.mover
    within = possible = 0.0
    for batch in BATCHES:
        v = batch[Site(2, "v")].repeat_interleave(2, dim=1)
        split = torch.einsum("bhts,bhse,fhe->btsf", batch[Site(2, "pattern")], v, mover.readers)
        positive = (split * batch.mask[:, None, :, None]).clamp(min=0)
        f = module.encode(batch).to_dense().view(*batch.mask.shape, -1) * module.decoder.norm(dim=1)
        mass = positive / positive.sum(2, keepdim=True).clamp(min=1e-30) * f[:, :, None]
        kind = dense_kinds(batch)["duplicate_token"]
        within = within + (mass * kind[..., None]).sum((0, 1, 2))
        possible = possible + (mass.sum(2) * kind.any(2)[..., None]).sum((0, 1))
    live = possible > 0
    np.testing.assert_allclose(found.share("duplicate_token")[live], (within / possible)[live], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.through.sum(1), found.mass, rtol=1e-4, atol=1e-6)
    assert found.skip_trigram_share() is None


@torch.no_grad()
def test_a_value_feature_is_moved_by_every_head_that_reads_it():
    module, found = measure("value_sae-two/topk")
    loadings = module.query_head_loadings(weights())
    expected = torch.zeros(24)
    for batch in BATCHES:
        pattern = torch.cat([batch[Site(2, "pattern")], batch[Site(4, "pattern")]], dim=1)
        f = module.encode(batch).to_dense().view(*batch.mask.shape, -1)
        moves = torch.einsum("fh,bhts,bsf->btsf", loadings, pattern, f) * batch.mask[:, :, None, None]
        expected += moves.sum((0, 1, 2))
    np.testing.assert_allclose(found.mass, expected, rtol=1e-4)


@torch.no_grad()
def test_a_value_sae_without_any_pattern_leaves_its_features_where_they_are():
    module, _ = ready("value_sae-two/topk")
    mover = mover_of(module, weights(), lambda layer: False)
    found = moved(mover, BATCHES, delimiter=even)
    assert not mover.moves_between_positions
    live = found.mass.numpy() > 0
    assert found.share("same_position")[live] == pytest.approx(1.0)


@torch.no_grad()
def test_queries_that_are_left_out_move_nothing():
    module, _ = ready("mtc/topk")
    half = [batch.mask & (torch.arange(9) > 4) for batch in BATCHES]
    found = moved(mover_of(module, weights()), BATCHES, delimiter=even, destinations=half)
    expected = sum((dense_masses(module, b).abs() * own[:, :, None, None]).sum((0, 1, 2))
                   for b, own in zip(BATCHES, half, strict=True))  # fmt: skip
    np.testing.assert_allclose(found.mass, expected, rtol=1e-4, atol=1e-7)


def test_an_unknown_architecture_is_refused():
    module, _ = ready("attn_out_sae/topk")
    object.__setattr__(module, "config", type("Config", (), {"kind": "clt"})())
    with pytest.raises(ValueError, match="architecture 'clt'; name runs of an MTC"):
        mover_of(module, weights())
