import pytest
import torch

from crosshead.analysis import pruning
from crosshead.analysis.evaluation import EvaluationConfig, evaluate
from crosshead.analysis.pruning import pruned_errors
from crosshead.dictionaries.base import Batch
from tests.analysis.test_evaluation import ready
from tests.dictionaries.cases import random_batch

TRAIN = [random_batch(seed) for seed in (20, 21, 22)]


def test_gains_and_error_equal_ordinary_least_squares(monkeypatch):
    """Brute force: every feature's written output as one column of a dense design matrix."""
    monkeypatch.setattr(pruning, "_PULL", 0.0)
    module, batches = ready("mtc/topk")
    with torch.no_grad():
        module.decoder.copy_(torch.nn.init.orthogonal_(torch.empty_like(module.decoder)))
    row = pruned_errors(module, TRAIN, batches)[0]
    assert row.movers == 1
    with torch.no_grad():
        energies = torch.stack([module.contributions(b) for b in TRAIN]).sum(0)
        strongest = torch.nn.functional.one_hot(energies.argmax(0), len(energies)).T
        original = module.loadings.clone()
        module.loadings.mul_(strongest)

        def design(group):
            columns, rest, target = [], [], []
            for batch in group:
                codes = codes_of(batch)
                base = module.decode(codes.with_values(torch.zeros_like(codes.values)), batch)
                own = [module.decode(codes.with_values(codes.values * (codes.columns == i)), batch) - base
                       for i in range(module.config.features)]  # fmt: skip
                columns.append(torch.stack([o[batch.mask].flatten() for o in own], dim=1))
                target.append(module.target(batch)[batch.mask].flatten())
                rest.append((module.target(batch) - base)[batch.mask].flatten())
            return torch.cat(columns).double(), torch.cat(rest).double(), torch.cat(target).double()

        def codes_of(batch):
            module.loadings.copy_(original)  # which features are active is decided with all movers
            codes = module.encode(batch)
            module.loadings.mul_(strongest)
            return codes

        columns, rest, _ = design(TRAIN)
        alive = columns.square().sum(0) > 0
        gains = torch.ones(len(alive), dtype=torch.float64)
        gains[alive] = torch.linalg.lstsq(columns[:, alive], rest[:, None], driver="gelsd").solution[:, 0]
        columns, rest, target = design(batches)
        expected = float((rest - columns @ gains).square().sum() / target.square().sum())
    assert row.normalised_mse == pytest.approx(expected, rel=1e-4)
    assert row.n_tokens == sum(b.n_counted for b in batches)


def with_own_target(module, batch):
    """The batch with the dictionary's own reconstruction as the layer's output: a truth without error."""
    return Batch(dict(batch.sites) | module.reconstruct(batch), batch.mask, batch.tokens)


def test_a_truth_of_many_movers_needs_them_and_one_of_single_movers_does_not():
    for spread in (True, False):
        module, _ = ready("mtc/topk")
        with torch.no_grad():
            loadings = torch.rand(module.loadings.shape, generator=torch.Generator().manual_seed(0)) + 0.5
            kept = torch.nn.functional.one_hot(loadings.argmax(0), len(loadings)).T
            module.loadings.copy_(loadings if spread else loadings * kept + 1e-6)
        train, heldout = ([with_own_target(module, b) for b in group] for group in (TRAIN, TRAIN[:1]))
        rows = pruned_errors(module, train, heldout)
        assert [row.movers for row in rows] == [1, 2, 4, len(module.loadings)]
        errors = [row.normalised_mse for row in rows]
        assert errors[-1] < 1e-6
        assert (errors[0] > 0.05) is spread
        if spread:
            assert errors[0] > errors[1] > errors[2] > errors[3]


def test_the_refit_never_does_worse_than_gains_of_one_where_it_is_fitted():
    module, _ = ready("mtc/topk")
    unpruned = evaluate(module, TRAIN, EvaluationConfig(detail_contexts=99)).normalised_mse
    assert pruned_errors(module, TRAIN, TRAIN)[-1].normalised_mse <= unpruned * (1 + 1e-6)


def test_a_one_mover_dictionary_has_one_row():
    module, batches = ready("mtc-top1/topk")
    assert [row.movers for row in pruned_errors(module, TRAIN, batches)] == [1]


def test_dictionaries_that_move_nothing_have_no_row():
    module, batches = ready("attn_out_sae/topk")
    assert pruned_errors(module, TRAIN, batches) == []


def test_a_feature_that_fired_once_in_the_refit_sample_keeps_its_gain():
    """What noise says about a rare feature must not be believed: on other contexts it would do harm."""
    module, batches = ready("mtc/topk")
    noise, target = torch.Generator().manual_seed(0), module.target_sites[0]
    noisy = {target: TRAIN[0][target] + 3.0 * torch.randn(TRAIN[0][target].shape, generator=noise)}
    train = [Batch(dict(TRAIN[0].sites) | noisy, TRAIN[0].mask, TRAIN[0].tokens)]
    unpruned = evaluate(module, batches, EvaluationConfig(detail_contexts=99)).normalised_mse
    assert pruned_errors(module, train, batches)[-1].normalised_mse < 1.05 * unpruned


def test_gains_of_rare_features_stay_near_one_and_of_common_ones_follow_the_data():
    """A feature that scales what it moves by 3 where it fires often is believed, once in the sample it is not."""
    normal = torch.diag(torch.tensor([1e6, 1.0], dtype=torch.float64))
    moment = 3.0 * normal.diagonal()
    common, rare = pruning._solve(normal, moment, torch.tensor(40.0, dtype=torch.float64))
    assert common == pytest.approx(3.0, rel=1e-3)
    assert rare == pytest.approx((3.0 + 40.0) / 41.0, rel=0.1)


def test_every_choice_of_movers_is_pulled_alike(monkeypatch):
    module, _ = ready("mtc/topk")
    pulls, solve = [], pruning._solve
    monkeypatch.setattr(pruning, "_solve", lambda *args: pulls.append(float(args[2])) or solve(*args))
    assert len(pruned_errors(module, TRAIN, TRAIN)) == len(pulls) > 1
    assert len(set(pulls)) == 1
