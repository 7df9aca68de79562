import pytest
import torch

from crosshead.analysis.qk_planted import PlantedQK, PlantedQKConfig, _tables, planted_trial
from crosshead.attention import qk_start


@pytest.mark.parametrize("position", ["content", "rotary"])
def test_planted_scores_are_sums_over_the_planted_features(position):
    config = PlantedQKConfig(features=4, active=2, length=10, contexts=4, noise=0.0, position=position)
    tables = _tables(config)
    source = PlantedQK.draw(config, 4, tables, 1)
    scores = (source.q @ source.k.transpose(-1, -2))[:, 0]
    kernel = torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(10, 10, 4)
    if tables is not None:
        angle = torch.rand(2, 4, generator=torch.Generator().manual_seed(config.seed)) * 2 * torch.pi
        place = torch.arange(10)
        frequency = torch.atan2(tables[1][1, :4], tables[0][1, :4])
        kernel = ((place[:, None] - place)[..., None] * frequency + angle[0] - angle[1]).cos()
    expected = torch.einsum("nti,nsi,tsi->nts", source.u, source.v, kernel)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)


# Half of the features subtract. Where they turn with distance a thousand steps find half, 2,500 three quarters.
@pytest.mark.parametrize(("position", "share", "error"), [("content", 0.7, 0.15), ("rotary", 0.4, 0.19)])
def test_planted_features_are_recovered_and_not_without_training(position, share, error):
    found = planted_trial(PlantedQKConfig(position=position))
    assert found["share_recovered"] >= share, found
    assert found["normalised_mse"] < error, found
    untrained = planted_trial(PlantedQKConfig(position=position, steps=1))
    assert untrained["correlation"] < found["correlation"]
    assert untrained["normalised_mse"] > found["normalised_mse"]


@pytest.mark.parametrize("position", ["content", "rotary"])
def test_both_sides_start_firing_on_the_pair_that_they_are_drawn_from(position, monkeypatch):
    seen = {}

    def spy(name):
        own = getattr(qk_start, name)
        monkeypatch.setattr(qk_start, name, lambda *a: seen.setdefault(name, (a, own(*a)))[1])

    spy("_draw_pairs")
    spy("_codes")
    planted_trial(PlantedQKConfig(features=6, active=2, contexts=16, length=16, position=position, steps=1))
    rows, drawn = seen["_codes"][0][1], seen["_draw_pairs"][1]
    both = ((drawn.query, rows.q), (drawn.key, rows.k))
    for (chosen, _), codes in zip(both, seen["_codes"][1], strict=True):
        own = codes.to_dense()
        fired = own[chosen, torch.arange(len(chosen))]
        assert (fired > 0).float().mean() > 0.7
        assert fired.mean() > 2 * own.mean()
    if position == "content":
        scores = (rows.q[drawn.query, 0] * rows.k[drawn.key, 0]).sum(-1)
        assert set((scores > 0).tolist()) == {True, False}
