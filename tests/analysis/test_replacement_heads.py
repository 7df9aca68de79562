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
from tests.attention.replacements import padded_batch, started

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


@pytest.mark.parametrize("case", ["plain", "plain-gates", "rank_one", "rank_one-gates", "combined", "combined-l1"])
def test_what_heads_move_from_all_keys_sums_to_what_they_write(case):
    module, _ = started(case)
    module.eval()
    with torch.no_grad():
        module.out.copy_(torch.randn(module.out.shape, generator=torch.Generator().manual_seed(3)))
        if module.config.gates is not None:
            module.gate[:] = torch.linspace(0.0, 1.0, len(module.gate))
    batch = padded_batch(5)
    with torch.no_grad():
        z = module.encode(batch).view(*batch.mask.shape, module.config.features, -1)
        out = module.out.unflatten(0, (module.config.features, -1))
        found = list(skip_trigrams._moves(module, batch, range(module.config.features)))
    for head, moves in enumerate(found):
        expected = (z[:, :, head] @ out[head]).detach()
        assert_close(moves.pattern @ moves.written, expected, rtol=1e-4, atol=1e-5)
        everywhere = torch.ones_like(batch.mask)
        assert_close(moves.from_keys(everywhere), expected[:, -1], rtol=1e-4, atol=1e-5)
    active = torch.stack([moves.pattern.any(-1) for moves in found]).sum(0)
    if case == "rank_one":
        assert (active[batch.mask] == 5).all()


def test_only_counted_keys_between_the_first_and_the_last_position_are_removed():
    batch = padded_batch(5)
    keys = skip_trigrams._earlier_keys(batch)
    assert [torch.nonzero(row).flatten().tolist() for row in keys] == [[1, 2, 3, 4, 5], [*range(1, 8)], [*range(1, 8)]]


def test_a_fall_is_the_difference_between_two_runs_of_the_model(tiny_model):
    """What one head moves from one token's earlier keys, in a loop, is taken out by a hook of its own."""
    model = tiny_model("llama")
    module, tokens = make_module(model), make_tokens(3, 7)
    tokens[1, [3, 6, 9]] = 5
    place = skip_trigrams._Place(1, 9)
    (fall,) = skip_trigrams._fall(module, model, reader(model, tokens), place, [3], 5)
    batch = captured(model, tokens[1:2])
    pattern, v = module.patterns(batch, slice(3, 4))[0, 0], module.values(batch)[0][0, 3]
    keys = [s for s in range(1, 9) if tokens[1, s] == 5]
    assert {3, 6} <= set(keys)
    assert pattern[9, 9] > 0  # its own key, of the same token, stays
    written = (sum(pattern[9, s] * v[s] @ module.out[12:16] for s in keys) / module.target_scale).detach()

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
    (nothing,) = skip_trigrams._fall(module, model, reader(model, tokens), place, [3], 40)
    assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-5)


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


def test_excess_is_over_what_the_margins_give():
    """The frequent pair has the largest sum; the rarer one alone is more than its tokens' margins."""
    sums = {(1, 1): 60.0, (1, 2): 20.0, (2, 1): 20.0, (3, 3): 8.0, (4, 1): 12.0}
    found = skip_trigrams._excesses(sums)
    table = torch.zeros(5, 5, dtype=torch.float64)
    for pair, size in sums.items():
        table[pair] = size
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    for pair, (excess, lift) in found.items():
        assert excess == pytest.approx(float(table[pair] - expected[pair]))
        assert lift == pytest.approx(float(table[pair] / expected[pair]))
    assert max(sums, key=sums.__getitem__) == (1, 1)
    assert max(found, key=lambda pair: found[pair][0]) == (3, 3)
    assert skip_trigrams._excesses({}) == {}


def test_rare_pairs_in_excess_are_listed_before_frequent_ones_and_each_once(tiny_model, monkeypatch):
    """Two heads with the same planted pair, (7, 6), beside (1, 2), which is frequent in both: the stronger takes it."""
    model = tiny_model("llama")
    module = make_module(model)
    tables = [{(1, 2): 60.0, (1, 3): 20.0, (4, 2): 20.0, (7, 6): 8.0},
              {(1, 2): 60.0, (1, 3): 20.0, (4, 2): 20.0, (7, 6): 7.0, (5, 8): 6.5}]  # fmt: skip

    def planted_moves(_module, batch, chosen):
        """Every pair in both contexts of a batch, the later one first among equals."""
        rows = [[(size / 4, context, t, *pair) for t, (pair, size) in enumerate(own.items(), 9) for context in (1, 0)]
                for own in tables]  # fmt: skip
        return rows + [[]] * (len(chosen) - 2)

    monkeypatch.setattr(skip_trigrams, "_strongest_moves", planted_moves)
    heldout = torch.tensor([[0, 2, 1, 3, 1, 6, 7, 8, 5, 2, 4]])
    train = reader(model, make_tokens(4, 1)), 4
    found = skip_trigrams._triples(module, train, heldout, 2, 3, 2)
    assert [(triple.head, triple.query, triple.key) for triple in found] == [(0, 7, 6), (1, 5, 8)]
    assert found[0].share == pytest.approx(8 / 108)
    assert found[0].lift == pytest.approx(108 / 8)
    assert found[0].n_contexts == 4
    assert found[0].train == [(0, 12), (1, 12), (2, 12)]
    assert found[0].heldout == [(0, 6)]
    # (5, 8) does not occur, (7, 6) is taken, and (1, 2) exceeds its margins by less than (1, 3).
    without = heldout[:, :7]
    again = skip_trigrams._triples(module, train, without, 2, 3, 2)
    assert [(triple.head, triple.query, triple.key) for triple in again] == [(0, 7, 6), (1, 1, 3)]


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
        assert row["lift"] > 1
        assert row["confirmed"] == (None not in others and row["fall"] > max(0.0, *others)
                                    and row["attention"] > row["attention_elsewhere"])  # fmt: skip
    pairs = [(row["query"], row["key"]) for row in found["triples"]]
    assert len(set(pairs)) == len({row["head"] for row in found["triples"]}) == 3
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
    triples = [skip_trigrams._Triple(head, query, key, 0.5, 2.0, 2, [], [skip_trigrams._Place(context, 9)])
               for head, query, key, context in ((1, 5, 3, 0), (4, 6, 8, 1), (2, 7, 2, 2))]  # fmt: skip
    for triple in triples:
        tokens[triple.heldout[0].context, 4] = triple.key
    with torch.no_grad():
        keep = module.out[4:8].clone()
        module.out.zero_()
        module.out[4:8] = 5 * keep

    def fall_at(triple: skip_trigrams._Triple) -> torch.Tensor:
        """Of the writing head, from the keys of the place's own triple."""
        return skip_trigrams._fall(module, model, reader(model, tokens), triple.heldout[0], [1], triple.key)[0]

    fall = fall_at(triples[0])
    promoted = [(int(fall.argmax()), 1.0), (20, 1.0), (21, 1.0)]
    first, second, _ = skip_trigrams._checked(module, model, reader(model, tokens), triples, promoted)
    assert first.own == pytest.approx(float(fall.max()), rel=1e-4)
    assert first.own > 1e-4
    assert first.controls["head"] == pytest.approx(0.0, abs=1e-5)
    assert first.controls["token"] == pytest.approx(float(fall[20]), rel=1e-3, abs=1e-5)
    others = [float(fall_at(triple)[promoted[0][0]]) for triple in triples[1:]]
    assert first.controls["pair"] == pytest.approx(max(others), rel=1e-3, abs=1e-5)
    assert first.n_other_pairs == 2
    assert second.own == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("attention", "confirmed"), [((0.3, 0.1), True), ((0.1, 0.1), False)])
def test_a_triple_is_confirmed_only_where_its_head_attends_to_the_key(tiny_model, monkeypatch, attention, confirmed):
    monkeypatch.setattr(skip_trigrams, "_attention", lambda *_arguments: attention)
    model = tiny_model("llama")
    triple = skip_trigrams._Triple(1, 5, 3, 0.5, 2.0, 2, [], [skip_trigrams._Place(0, 9)])
    found = skip_trigrams._Checked(triple, 7, 1.0, 0.5, {"head": 0.1, "token": 0.0, "pair": -0.1}, 2)
    row = skip_trigrams._row(make_module(model), model, reader(model, make_tokens(1, 0)), found)
    assert (row["confirmed"], row["lift"]) == (confirmed, 2.0)


def test_attention_is_counted_on_earlier_keys_alone(tiny_model):
    model = tiny_model("llama")
    module, tokens = make_module(model), make_tokens(1, 2, vocabulary=4)
    tokens[0, [2, 5, 9]], tokens[0, [1, 3]] = 3, 1
    triple = skip_trigrams._Triple(2, 3, 3, 0.5, 2.0, 2, [], [skip_trigrams._Place(0, 9)])
    found = skip_trigrams._attention(module, reader(model, tokens), triple)
    row = module.patterns(captured(model, tokens), slice(2, 3))[0, 0, 9]
    same = [s for s in range(1, 9) if tokens[0, s] == 3]
    assert found == pytest.approx((float(row[same].sum()), len(same) * float(row[1:9].mean())), rel=1e-4)
