import pytest
import torch

from crosshead.analysis.qk_planted import PlantedQK, PlantedQKConfig, _tables, planted_trial


@pytest.mark.parametrize("position", ["content", "rotary"])
def test_planted_scores_are_sums_over_the_planted_features(position):
    config = PlantedQKConfig(features=4, active=2, length=10, contexts=4, noise=0.0, position=position)
    tables = _tables(config)
    source = PlantedQK.draw(config, 4, tables, 1)
    scores = (source.q @ source.k.transpose(-1, -2))[:, 0]
    kernel = torch.ones(10, 10, 4)
    if tables is not None:
        angle = torch.rand(2, 4, generator=torch.Generator().manual_seed(config.seed)) * 2 * torch.pi
        place = torch.arange(10)
        frequency = torch.atan2(tables[1][1, :4], tables[0][1, :4])
        kernel = ((place[:, None] - place)[..., None] * frequency + angle[0] - angle[1]).cos()
    expected = torch.einsum("nti,nsi,tsi->nts", source.u, source.v, kernel)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)


# Where features turn with distance, training finds a third to a half of them.
@pytest.mark.parametrize(("position", "share", "error"), [("content", 0.95, 0.05), ("rotary", 0.25, 0.3)])
def test_planted_features_are_recovered_and_not_without_training(position, share, error):
    found = planted_trial(PlantedQKConfig(position=position))
    assert found["share_recovered"] >= share, found
    assert found["normalised_mse"] < error, found
    untrained = planted_trial(PlantedQKConfig(position=position, steps=1))
    assert untrained["correlation"] < found["correlation"]
    assert untrained["normalised_mse"] > found["normalised_mse"]
