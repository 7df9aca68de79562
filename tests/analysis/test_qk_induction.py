"""A model made by hand with one induction feature, one previous-token feature and one that fires on everything."""

import json

import pytest
import torch

from crosshead.analysis.qk_induction import InductionConfig, induction_features, induction_shares
from crosshead.attention.qk_diagonal import Config, Module
from crosshead.dictionaries.base import Batch, ModelDims, Site
from crosshead.maths.patterns import AttentionSpec
from tests.analysis.qk import trained

V, LENGTH = 6, 20
DIMS = ModelDims(d_model=2 * V + 1, n_heads=1, n_kv_heads=1, head_dim=2 * V + 1, n_layers=1)


def one_hot_batch(n_contexts: int, seed: int) -> Batch:
    """q holds the current token, k the previous one; both also hold one constant."""
    # No token follows itself: a key after a token would be the query.
    steps = torch.randint(1, V - 1, (n_contexts, LENGTH), generator=torch.Generator().manual_seed(seed))
    tokens = steps.cumsum(1) % (V - 1) + 1
    tokens[:, 0] = 0
    now = torch.nn.functional.one_hot(tokens, V).float()
    before = now.roll(1, 1)
    before[:, 0] = 0
    ones, zeros = torch.ones(*tokens.shape, 1), torch.zeros_like(now)
    mask = tokens > 0
    sites = {Site(0, "q"): torch.cat([now, zeros, ones], -1)[:, None],
             Site(0, "k"): torch.cat([before, now, ones], -1)[:, None]}  # fmt: skip
    return Batch(sites, mask, tokens)


def hand_made() -> Module:
    """Feature i < V: query token i, key after token i. Feature V: any pair. V + 1: query token 1, key token 2."""
    module = Module(Config.model_validate({"layers": [0], "features": V + 2, "position": "content",
                                           "sparsity": {"kind": "topk", "k": V + 2}}), DIMS)  # fmt: skip
    module.use_attention_(AttentionSpec(n_heads=1, n_kv_heads=1, head_dim=2 * V + 1, scale=1.0), None)
    with torch.no_grad():
        for i in range(V):
            module.query_encoder.weight[i, i] = 1.0
            module.key_encoder.weight[i, i] = 1.0
        module.query_encoder.weight[V, -1] = module.key_encoder.weight[V, -1] = 1.0
        module.query_encoder.weight[V + 1, 1] = module.key_encoder.weight[V + 1, V + 2] = 1.0
        module.kernel.fill_(1.0)
    return module.eval()


def test_shares_find_the_induction_features_and_give_others_their_chance():
    module, batch = hand_made(), one_hot_batch(6, 0)
    share, expected, firings = induction_shares(module, [batch])
    assert torch.allclose(share[1:V], torch.ones(V - 1, dtype=torch.float64))
    assert float(share[V]) == pytest.approx(float(expected[V]), abs=1e-9), (
        "a feature on every pair has what chance gives"
    )
    assert float(share[V + 1]) < 0.5
    assert (expected[1:V] < 0.5).all()
    assert int(firings[V]) == int(batch.mask.sum())


def test_the_share_equals_plain_loops():
    module, batch = hand_made(), one_hot_batch(3, 1)
    share, _, _ = induction_shares(module, [batch])
    within = total = 0
    for c in range(3):
        tokens = batch.tokens[c].tolist()
        for t in range(1, LENGTH):
            keys = [s for s in range(2, t) if tokens[s - 1] == tokens[t]]
            if not keys or tokens[t] != 1:
                continue
            fires = [s for s in range(1, t + 1) if tokens[s] == 2]
            within += len(set(keys) & set(fires))
            total += len(fires)
    assert within > 0
    assert float(share[V + 1]) == pytest.approx(within / total)


@pytest.fixture(scope="module")
def found(tiny_model):
    model = tiny_model("llama")
    module, heldout = trained(model)
    config = InductionConfig(sequences=8, length=16, text_contexts=6, top=3, permutations=4, minimum_firings=2)
    return induction_features(module, model, heldout, config), induction_features(module, model, heldout, config)


def test_features_are_described_and_held_against_permuted_pairs(found):
    record, again = found
    assert json.dumps(record) == json.dumps(again)
    assert 0 < len(record["features"]) <= 3
    scores = [feature["score"] for feature in record["features"]]
    assert scores == sorted(scores, reverse=True)
    for feature in record["features"]:
        assert feature["n_permuted"] <= 4
        assert sum(feature["alike"].values()) == pytest.approx(1.0, abs=1e-6) or not feature["examples"]
        assert {"query", "key", "before_key"} <= feature.keys()
        for example in feature["examples"]:
            assert "[" in example["key"]
