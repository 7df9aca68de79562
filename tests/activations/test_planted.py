from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.testing import assert_close

from crosshead.activations.cache import ActivationCache
from crosshead.activations.planted import PlantedConfig, Truth, plant
from crosshead.activations.planted_heads import HeadKind, PlantedHeads, draw_pairs, draw_tokens, looked_for
from crosshead.dictionaries.base import Batch, Site
from crosshead.io.files import read_json
from tests.activations.harvests import file_bytes

KINDS = get_args(HeadKind)
SMALL: dict[str, Any] = {"train_contexts": 40, "heldout_contexts": 8, "context_length": 16, "vocabulary": 10,
                         "d_model": 32, "features": 20, "l0": 2.0, "noise": 0.0}  # fmt: skip


def small(**changes: Any) -> PlantedConfig:
    return PlantedConfig.model_validate(SMALL | changes)


def planted(directory: Path, **changes: Any) -> tuple[Truth, ActivationCache]:
    truth = plant(small(**changes), directory / "planted")
    return truth, ActivationCache.open(directory / "planted" / "cache", verify="sha256")


def whole(cache: ActivationCache, layer: int = 0) -> dict[str, torch.Tensor]:
    names = ("resid_in", "pattern", "v", "attn_out")
    batch: Batch = cache.read("train", range(cache.n_contexts("train")), [Site(layer, name) for name in names])
    return {name: batch[Site(layer, name)].double() for name in names}


def activations(truth: Truth, resid: torch.Tensor) -> torch.Tensor:
    """Without noise, and with fewer atoms than dimensions, the residual stream says which atoms fire."""
    found = resid @ torch.linalg.pinv(truth.encoder.double())
    found[:, 0] = 0.0
    return found


@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_without_noise_outputs_are_what_the_equations_say(mixing, tmp_path):
    truth, cache = planted(tmp_path, mixing=mixing)
    found = whole(cache)
    a = activations(truth, found["resid_in"])
    L, D, A = truth.loadings[0].double(), truth.decoder[0].double(), found["pattern"]
    W_O = cache.weights()[0].W_O.double()
    for c, t in product(range(3), range(1, 16)):
        expected = torch.zeros(32, dtype=torch.float64)
        for i in range(20):
            moved = sum((sum(L[h + 1, i] * A[c, h, t, s] for h in range(6)) + L[0, i] * (s == t)) * a[c, s, i]
                        for s in range(t + 1))  # fmt: skip
            expected += moved * D[i]
        for h in range(6):
            expected += A[c, h, t, 0] * (found["v"][c, h, 0] @ W_O[h])
        assert_close(found["attn_out"][c, t], expected, rtol=1e-4, atol=1e-4)


def test_values_and_output_maps_give_the_output_of_the_heads(tmp_path):
    truth, cache = planted(tmp_path, mixing=1.0, ov_dimensions=(1, 2))
    found = whole(cache)
    by_heads = torch.einsum("bhts,bhse,hed->btd", found["pattern"], found["v"], cache.weights()[0].W_O.double())
    identity = (activations(truth, found["resid_in"]) * truth.loadings[0, 0]) @ truth.decoder[0].double()
    assert_close((by_heads + identity)[:, 1:], found["attn_out"][:, 1:], rtol=1e-4, atol=1e-4)


def heads(sharpness: float = 12.0) -> PlantedHeads:
    generator = torch.Generator().manual_seed(0)
    tokens = draw_tokens(20, 16, 9, 2, generator)
    pairs = draw_pairs(9, generator)
    return PlantedHeads.of(KINDS, tokens, pairs, delimiters=2, sharpness=sharpness, sink=4.0, width=30)


def wanted(kind: str, tokens: list[int], pairs: torch.Tensor, t: int) -> set[int]:
    match kind:
        case "previous_token":
            places = [t - 1]
        case "induction":
            places = [s for s in range(t + 1) if tokens[s - 1] == tokens[t]]
        case "duplicate_token":
            places = [s for s in range(t) if tokens[s] == tokens[t]]
        case "delimiter":
            places = [s for s in range(t + 1) if tokens[s] in (1, 2)]
        case "skip_trigram":
            places = [s for s in range(t + 1) if pairs[tokens[t], tokens[s]]]
        case "local":
            places = [t - 5, t - 4, t - 3, t - 2]
        case _:
            places = list(range(t + 1))
    return {s for s in places if s > 0}


@pytest.mark.parametrize("kind", KINDS)
def test_heads_look_where_their_kind_says(kind):
    """By brute force over positions; where there is nothing to see, attention rests on the first token."""
    found = heads()
    ideal = looked_for(kind, found.tokens, found.pairs, found.delimiters)
    for c, t in product(range(20), range(1, 16)):
        row = found.patterns[c, KINDS.index(kind), t]
        places = sorted(wanted(kind, found.tokens[c].tolist(), found.pairs, t))
        expected = torch.zeros(16)
        expected[places] = 1 / max(len(places), 1)
        assert_close(ideal[c, t], expected)
        if kind == "uniform":
            assert_close(row[1 : t + 1], row[1].expand(t))
        elif places:
            assert row[places].sum() > 0.99 * (1 - row[0])
            assert_close(row[places], row[places[0]].expand(len(places)))
        else:
            assert row[0] > 0.7


def test_semantic_patterns_of_planted_heads_are_nearly_what_the_heads_do():
    found = heads().semantic()
    assert all(found[kind]["residual"] < 0.1 for kind in KINDS if kind != "uniform")
    without = PlantedHeads.of(["previous_token", "local"], heads().tokens, heads().pairs, delimiters=2, sharpness=12.0,
                              sink=4.0, width=30)._replace(kinds=("induction",))  # fmt: skip
    assert without.semantic()["induction"]["residual"] > 0.3


def test_segments_repeat():
    tokens = draw_tokens(50, 32, 400, 2, torch.Generator().manual_seed(0))
    unrepeated = draw_tokens(50, 32, 400, 0, torch.Generator().manual_seed(0))
    distinct = [sum(len(set(row)) for row in x.tolist()) / 50 for x in (tokens, unrepeated)]
    assert distinct[0] < distinct[1] - 8
    assert (tokens[:, 0] == 0).all()
    assert (tokens[:, 1:] > 0).all()


def test_features_fire_as_often_as_planned_and_sizes_vary(tmp_path):
    truth, cache = planted(tmp_path, train_contexts=2500, features=24, l0=1.5, rarity=1.0)
    a = activations(truth, whole(cache)["resid_in"])[:, 1:].flatten(0, 1)
    fires = a > 0.05
    assert_close(fires.double().mean(0), truth.probability.double(), rtol=0.15, atol=0.003)
    assert fires.sum(1).double().mean() == pytest.approx(1.5, rel=0.05)
    ranked = truth.probability.sort(descending=True).values
    assert ranked[3] / ranked[7] == pytest.approx(2.0, rel=1e-4)
    assert a[fires].mean() == pytest.approx(1.0, rel=0.02)
    assert a[fires].log().std() == pytest.approx(0.4, rel=0.05)


def test_one_parameter_leads_from_one_mover_to_many(tmp_path):
    ratio = {}
    for mixing in (0.0, 0.5, 1.0):
        truth, _ = planted(tmp_path / str(mixing), mixing=mixing)
        assert_close(truth.loadings[0].norm(dim=0), torch.ones(20))
        ratio[mixing] = read_json(tmp_path / str(mixing) / "planted" / "planted.json")["movers_per_atom"]
        if mixing == 0:
            assert torch.equal(truth.loadings[0].argmax(0), (truth.family + 1) % 7)
    assert ratio[0.0] == pytest.approx(1.0)
    assert 1.0 < ratio[0.5] < ratio[1.0]


def test_mixing_changes_neither_contexts_nor_residual_stream(tmp_path):
    (_, one), (_, many) = (planted(tmp_path / str(m), mixing=m, noise=0.2) for m in (0.0, 1.0))
    assert torch.equal(one.tokens("train", range(40)), many.tokens("train", range(40)))
    assert torch.equal(whole(one)["resid_in"], whole(many)["resid_in"])
    assert not torch.allclose(whole(one)["attn_out"], whole(many)["attn_out"])


def test_atoms_of_a_feature_share_loadings_and_never_fire_together(tmp_path):
    truth, cache = planted(tmp_path, mixing=1.0, features=10, ov_dimensions=(1, 3), families=2)
    assert torch.bincount(truth.feature).tolist() == [1, 3] * 5
    fires = activations(truth, whole(cache)["resid_in"]) > 0.05
    for i in range(10):
        mine = truth.feature == i
        assert (truth.loadings[0][:, mine] == truth.loadings[0][:, mine][:, :1]).all()
        assert fires[..., mine].sum(-1).max() == 1


def test_noise_has_the_size_that_is_asked_for(tmp_path):
    (_, clean), (_, noisy) = (planted(tmp_path / str(noise), noise=noise, mixing=1.0) for noise in (0.0, 0.3))
    clean, noisy = whole(clean), whole(noisy)
    for name, position in (("resid_in", 1), ("attn_out", 1), ("v", 2)):
        signal, other = (x[name].narrow(position, 1, 15) for x in (clean, noisy))
        centred = signal - signal.mean((0, position), keepdim=True)
        assert (other - signal).square().mean().sqrt() / centred.square().mean().sqrt() == pytest.approx(0.3, rel=0.05)
        assert torch.equal(clean[name].select(position, 0), noisy[name].select(position, 0))


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_two_layers_share_as_many_features_as_asked(shared, tmp_path):
    truth, cache = planted(tmp_path, layers=2, shared=shared, sites=("v",))
    assert truth.active.all(0).sum() == round(20 * shared)
    assert truth.active.any(0).all()
    assert (truth.active[0].sum() - truth.active[1].sum()).abs() <= 1
    for layer in (0, 1):
        idle = ~truth.active[layer]
        assert (truth.loadings[layer][:, idle] == 0).all()
        assert (truth.decoder[layer][idle] == 0).all()
    assert cache.sites == (Site(0, "v"), Site(1, "v"))


def test_the_same_parameters_give_the_same_bytes_and_the_truth_can_be_read_again(tmp_path):
    truth, _ = planted(tmp_path / "a", noise=0.1)
    planted(tmp_path / "b", noise=0.1)
    for part in ("planted", "planted/cache"):
        files = [{path.name: path.read_bytes() for path in (tmp_path / run / part).iterdir() if path.is_file()}
                 for run in "ab"]  # fmt: skip
        assert files[0] == files[1]
    assert file_bytes(tmp_path / "a" / "planted" / "cache")
    loaded = Truth.load(tmp_path / "a" / "planted")
    assert loaded.config == truth.config
    for name, tensor in vars(truth).items():
        assert name == "config" or torch.equal(getattr(loaded, name), tensor)


def test_the_easy_layer_has_heads_that_can_be_told_apart(tmp_path):
    plant(PlantedConfig(train_contexts=128, heldout_contexts=8), tmp_path / "planted")
    described = read_json(tmp_path / "planted" / "planted.json")
    assert described["condition_number"] < 20
    assert described["atoms"] == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delimiters": 8}, "8 delimiters leave too few of 10 tokens"),
        ({"l0": 8.0}, "l0=8.0 of 20 features is not sparse"),
        ({"families": 30}, "30 families need as many features"),
    ],
)
def test_parameters_at_odds_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
