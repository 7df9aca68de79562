"""Skip-trigram and induction heads: planted ones are found, interventions are what they say."""

import pytest
import torch
from torch.testing import assert_close

from crosshead.activations.capture import attention_specs, capture, rotary_tables
from crosshead.activations.survey import position_kinds
from crosshead.analysis import induction_heads, skip_trigrams
from crosshead.analysis.induction_heads import find_induction_heads
from crosshead.analysis.skip_trigrams import find_skip_trigrams
from crosshead.attention.replacement import Config, Module
from crosshead.dictionaries.base import Batch, Site

LAYER, LENGTH = 1, 16


def captured(model, tokens: torch.Tensor) -> Batch:
    sites = [Site(LAYER, name) for name in ("resid_in", "attn_out")]
    return Batch(capture(model, tokens, sites), torch.arange(tokens.shape[1]).expand(tokens.shape) > 0, tokens)


def make_tokens(n_contexts: int, seed: int, vocabulary: int = 12) -> torch.Tensor:
    tokens = torch.randint(1, vocabulary, (n_contexts, LENGTH), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    return tokens


def make_module(model, features: int = 6, seed: int = 0) -> Module:
    module = Module(Config(layers=(LAYER,), features=features, head_dim=4), model.dims)
    module.use_attention_(attention_specs(model, [LAYER])[LAYER], rotary_tables(model, LAYER, 40))
    module.start_([captured(model, make_tokens(6, seed))], {}, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        module.out.mul_(10)
        module.bos_score.zero_()
    return module.eval()


def reader(model, tokens: torch.Tensor):
    return lambda contexts: captured(model, tokens[list(contexts)])


def test_a_planted_induction_pattern_is_found_and_no_other(tiny_model, monkeypatch):
    model = tiny_model("llama")
    module = make_module(model)

    def planted_patterns(_module, batch):
        pattern = torch.full((len(batch.mask), 6, *batch.mask.shape[1:] * 2), 0.0)
        pattern[..., 0] = 1.0
        wanted = position_kinds(batch.tokens)["induction"]
        pattern[:, 2] = torch.where(wanted.any(-1, keepdim=True), wanted.float(), pattern[:, 2])
        pattern[:, 4] = position_kinds(batch.tokens)["previous_token"].float()
        yield slice(0, 6), pattern

    monkeypatch.setattr(induction_heads, "each_pattern", planted_patterns)
    found = find_induction_heads(module, model, sequences=3, length=12, seed=0)
    assert [row["group"] for row in found["heads"]] == [2]
    assert found["heads"][0]["score"] == pytest.approx(1.0)
    assert found["heads"][0]["control"] < 0.3
    assert found["n_found_by_control"] == 0
    assert found["best_score"] == pytest.approx(1.0)
    assert len(found["base_scores"]) == model.dims.n_heads
    assert set(found["removal"]) == {"clean", "without_found", "without_others"}


def test_random_heads_are_no_induction_heads(tiny_model):
    model = tiny_model("llama")
    found = find_induction_heads(make_module(model), model, sequences=3, length=12, seed=0)
    assert found["n_found"] <= 1
    assert found["n_groups"] == 6
    assert 0 < found["median_score"] < 0.2


def test_removing_all_heads_takes_what_the_layer_writes_out_of_the_model(tiny_model):
    model = tiny_model("llama")
    module = make_module(model)
    batch = captured(model, make_tokens(2, 5))
    z = module.encode(batch)
    whole = module.decode(z, batch) - module.decoder_bias
    assert_close(induction_heads._written(module, batch, range(6)), whole.detach(), rtol=1e-4, atol=1e-5)


def test_a_fall_is_the_difference_between_two_runs_of_the_model(tiny_model):
    model = tiny_model("llama")
    module, tokens = make_module(model), make_tokens(3, 7)
    place = skip_trigrams._Place(1, 9)
    (fall,) = skip_trigrams._fall(module, model, reader(model, tokens), place, [3])
    batch = captured(model, tokens[1:2])
    own = slice(12, 16)
    written = (module.encode(batch)[9, own] @ module.out[own] / module.target_scale).detach()

    def without(_module, _arguments, output):
        out = output[0].clone()
        out[0, 9] -= written
        return (out, *output[1:])

    clean = model.model(tokens[1:2]).logits[0, 9]
    handle = model.model.model.layers[LAYER].self_attn.register_forward_hook(without)
    try:
        removed = model.model(tokens[1:2]).logits[0, 9]
    finally:
        handle.remove()
    expected = clean - removed
    assert_close(fall, (expected - expected.mean()).detach(), rtol=1e-3, atol=1e-4)


def test_the_strongest_moves_are_those_of_a_loop_over_pairs(tiny_model):
    model = tiny_model("llama")
    module, batch = make_module(model), captured(model, make_tokens(2, 8))
    (moves,) = skip_trigrams._strongest_moves(module, batch, torch.tensor([4]))
    pattern, v = module.patterns(batch, slice(4, 5))[:, 0], module.values(batch)[0][:, 4]
    sizes = (v @ module.out[16:20]).norm(dim=-1)
    pairs = [(b, t, s) for b in range(2) for t in range(2, LENGTH) for s in range(1, t)]
    expected = [(float(pattern[b, t, s] * sizes[b, s]), b, t, int(batch.tokens[b, t]), int(batch.tokens[b, s]))
                for b, t, s in pairs]  # fmt: skip
    expected.sort(reverse=True)
    assert len(moves) == len(expected)
    for found, wanted in zip(moves[:20], expected[:20], strict=True):
        assert found[0] == pytest.approx(wanted[0], rel=1e-4)
    assert {move[1:] for move in moves} == {move[1:] for move in expected}


def test_places_of_a_pair_have_the_key_before_the_query():
    tokens = torch.tensor([[0, 5, 7, 5, 7], [7, 7, 1, 5, 5]])
    assert skip_trigrams._places_of((7, 5), tokens) == [(0, 2), (0, 4)]
    assert skip_trigrams._places_of((5, 7), tokens) == [(0, 3), (1, 3), (1, 4)]
    assert skip_trigrams._places_of((5, 5), tokens) == [(0, 3), (1, 4)]


def test_triples_are_listed_with_their_controls_and_the_same_every_time(tiny_model):
    model = tiny_model("llama")
    module = make_module(model)
    arguments = (module, model, (reader(model, make_tokens(8, 1)), 8), (reader(model, make_tokens(8, 2)), 8))
    found = find_skip_trigrams(*arguments, heads=3, events=2)
    assert found == find_skip_trigrams(*arguments, heads=3, events=2)
    assert found["n_heads"] == len(found["triples"]) == 3
    assert found["chance"] == 1 / (1 + min(row["n_other_pairs"] for row in found["triples"]))
    for row in found["triples"]:
        assert row["n_train_contexts"] >= 2
        assert row["n_events"] == 2
        others = [row[f"fall_other_{name}"] for name in ("head", "token", "pair")]
        assert row["confirmed"] == (None not in others and row["fall"] > max(0.0, *others))
    assert found["n_confirmed"] == sum(row["confirmed"] for row in found["triples"])


def test_partners_are_the_next_that_differ():
    assert skip_trigrams._others([3, 4, 3, 5, 4], 0, 9) == [1, 3]
    assert skip_trigrams._others([3, 4, 3, 5, 4], 3, 1) == [4]
    assert [skip_trigrams._next_different([3, 3, 5, 3], i) for i in range(4)] == [2, 2, 3, 2]
    assert skip_trigrams._next_different([4, 4], 0) is None


def test_the_head_that_promotes_a_token_is_told_from_the_others(tiny_model):
    """One head alone writes: removing another changes nothing, and controls are the falls that they say."""
    model = tiny_model("llama")
    module, tokens = make_module(model), make_tokens(8, 1)
    triples = [skip_trigrams._Triple(head, query, 3, 0.5, 2, [], [skip_trigrams._Place(context, 9)])
               for head, query, context in ((1, 5, 0), (4, 6, 1), (2, 7, 2))]  # fmt: skip
    with torch.no_grad():
        keep = module.out[4:8].clone()
        module.out.zero_()
        module.out[4:8] = 5 * keep
    fall = skip_trigrams._fall(module, model, reader(model, tokens), triples[0].heldout[0], [1])[0]
    promoted = [(int(fall.argmax()), 1.0), (20, 1.0), (21, 1.0)]
    first, second, _ = skip_trigrams._checked(module, model, reader(model, tokens), triples, promoted)
    assert first.own == pytest.approx(float(fall.max()), rel=1e-4)
    assert first.controls["head"] == pytest.approx(0.0, abs=1e-5)
    assert first.controls["token"] == pytest.approx(float(fall[20]), rel=1e-3, abs=1e-5)
    others = [skip_trigrams._fall(module, model, reader(model, tokens), triple.heldout[0], [1])[0][promoted[0][0]]
              for triple in triples[1:]]  # fmt: skip
    assert first.controls["pair"] == pytest.approx(max(map(float, others)), rel=1e-3, abs=1e-5)
    assert first.n_other_pairs == 2
    assert second.own == pytest.approx(0.0, abs=1e-5)
