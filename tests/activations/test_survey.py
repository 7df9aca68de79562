import pytest
import torch
from pydantic import ValidationError

from crosshead.activations.base_model import load_model
from crosshead.activations.corpus import Corpus, CorpusConfig, build_corpus
from crosshead.activations.survey import (
    SCORES,
    LayerChoice,
    Survey,
    SurveyConfig,
    choose_layers,
    head_scores,
    load_layers,
    position_kinds,
    repeated_random_tokens,
    survey,
)

SMALL = {"sequences": 3, "length": 8, "text_contexts": 4, "min_gap": 2}


@pytest.fixture(scope="session")
def corpus(tiny_model, tmp_path_factory) -> Corpus:
    """Contexts of 24 bytes for the tiny models."""
    root = tmp_path_factory.mktemp("survey-corpus")
    for i in range(8):
        (root / f"{i}.txt").write_text(f"the cat {i} and the dog {i} sat on the mat; " * 6)
    part = {"domain": "prose", "path": str(root)}
    config = CorpusConfig(
        source="local", context_length=24, train_contexts=6, heldout_contexts=2, domains=[part], contexts_per_document=2
    )
    build_corpus(config, tiny_model("llama").tokenizer, root / "corpus", work=root / "work")
    return Corpus.load(root / "corpus")


def kinds_by_definition(row: list[int], t: int, s: int) -> set[str]:
    """Which kinds of position key s is for query t, straight from the definitions."""
    kinds = set()
    if t > 0 and s == 0:
        kinds.add("first_token")
    if t > 1 and s == t - 1:
        kinds.add("previous_token")
    if 0 < s < t and row[s] == row[t]:
        kinds.add("duplicate_token")
    if 1 < s < t and row[s - 1] == row[t]:
        kinds.add("induction")
    return kinds


def test_position_kinds_follow_their_definitions():
    tokens = torch.randint(1, 5, (3, 14), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    tokens[0, 0] = tokens[0, 5]  # a first token that recurs is still no match
    kinds = position_kinds(tokens)
    for b, row in enumerate(tokens.tolist()):
        for t in range(14):
            for s in range(14):
                assert {name for name in SCORES if kinds[name][b, t, s]} == kinds_by_definition(row, t, s)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_head_scores_equal_a_loop_over_eager_patterns(family, tiny_model_directory):
    model = load_model(tiny_model_directory(family))
    tokens = torch.randint(1, 12, (3, 10), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = model.bos_id
    model.model.set_attn_implementation("eager")
    patterns = torch.stack(model.model(tokens, output_attentions=True).attentions).double()  # [L, B, H, T, T]
    scores = head_scores(model, tokens)
    for name in SCORES:
        mass, n_queries = torch.zeros(patterns.shape[0], patterns.shape[2], dtype=torch.float64), 0
        for b, row in enumerate(tokens.tolist()):
            for t in range(10):
                keys = [s for s in range(10) if name in kinds_by_definition(row, t, s)]
                n_queries += bool(keys)
                mass += patterns[:, b, :, t, keys].sum(-1)
        torch.testing.assert_close(scores[name], mass / n_queries, rtol=1e-5, atol=1e-6)


def test_a_score_without_any_such_position_is_zero(tiny_model):
    scores = head_scores(tiny_model("llama"), torch.tensor([[0, 5, 6, 7, 8]]))
    assert scores["induction"].abs().max() == scores["duplicate_token"].abs().max() == 0
    assert scores["previous_token"].min() > 0


def test_random_tokens_repeat_once_and_are_otherwise_distinct_and_ordinary(tiny_model):
    model = tiny_model("llama")
    tokens = repeated_random_tokens(model, sequences=4, length=20, seed=0)
    assert tokens.shape == (4, 41)
    assert (tokens[:, 0] == model.bos_id).all()
    torch.testing.assert_close(tokens[:, 1:21], tokens[:, 21:])
    for row in tokens.tolist():
        assert len(set(row[1:21])) == 20
        assert not set(row[1:]) & set(model.tokenizer.all_special_ids)
    assert len({tuple(row) for row in tokens.tolist()}) == 4
    assert torch.equal(tokens, repeated_random_tokens(model, 4, 20, seed=0))
    assert not torch.equal(tokens, repeated_random_tokens(model, 4, 20, seed=1))


# --- choice of layers


def test_the_far_pair_has_the_largest_sum_at_the_gap_and_the_neighbour_lies_above():
    scores = [0.0, 0.1, 0.9, 0.8, 0.2, 0.3, 0.0, 0.5]
    assert choose_layers(scores, 3) == LayerChoice(first=2, second=7, adjacent=3)
    assert choose_layers(scores, 1) == LayerChoice(first=2, second=3, adjacent=3)
    assert choose_layers(scores, 7) == LayerChoice(first=0, second=7, adjacent=1)


def test_the_choice_agrees_with_trying_every_pair():
    generator = torch.Generator().manual_seed(0)
    for gap in (1, 2, 5):
        scores = torch.rand(9, generator=generator).tolist()
        chosen = choose_layers(scores, gap)
        best = max(scores[a] + scores[b] for a in range(9) for b in range(9) if b - a >= gap)
        assert scores[chosen.first] + scores[chosen.second] == best
        assert chosen.second - chosen.first >= gap
        assert chosen.adjacent == chosen.first + 1


def test_survey_records_every_head_and_saves_exactly(tiny_model, corpus, tmp_path):
    model = tiny_model("llama")
    result = survey(model, corpus, SurveyConfig(**SMALL))
    assert [(row["layer"], row["head"]) for row in result.heads] == [(a, b) for a in range(3) for b in range(4)]
    assert set(result.heads[0]) == {"layer", "head", *SCORES, *(f"text_{name}" for name in SCORES)}
    text = head_scores(model, corpus.tokens("train")[:4])
    assert result.heads[6]["text_duplicate_token"] == pytest.approx(text["duplicate_token"][1, 2].item(), abs=1e-6)
    assert result.layers == LayerChoice(first=0, second=2, adjacent=1)
    assert (result.n_random_tokens, result.n_text_tokens) == (3 * 17, 4 * 24)
    result.save(tmp_path / "survey")
    assert Survey.load(tmp_path / "survey") == result
    assert load_layers(tmp_path / "survey") == {"first": 0, "second": 2, "adjacent": 1}


def test_listed_layers_override_the_choice(tiny_model, corpus):
    config = SurveyConfig(**SMALL | {"layers": {"first": 0, "second": 1, "adjacent": 2}, "min_gap": 6})
    assert survey(tiny_model("llama"), corpus, config).layers == LayerChoice(first=0, second=1, adjacent=2)


def test_a_list_names_first_second_and_adjacent():
    expected = LayerChoice(first=17, second=23, adjacent=18)
    assert SurveyConfig.model_validate({"layers": [17, 23, 18]}).layers == expected
    assert SurveyConfig(layers=expected).layers == expected


# --- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 64}, "length=64 makes contexts of 129 tokens, the model allows 128; lower it to 63"),
        ({"text_contexts": 7}, "text_contexts=7 exceeds the corpus's 6 training contexts"),
        ({"min_gap": 3}, "min_gap=3 leaves no pair among the model's 3 layers"),
        ({"layers": {"first": 1, "second": 3, "adjacent": 2}}, "layers.second=3 is out of range; .* 0 to 2"),
    ],
)
def test_a_survey_that_does_not_fit_the_model_is_refused(tiny_model, corpus, fields, message):
    with pytest.raises(ValueError, match=message):
        survey(tiny_model("llama"), corpus, SurveyConfig(**SMALL | fields))


def test_a_corpus_of_another_tokenizer_is_refused(smollm2, corpus):
    with pytest.raises(ValueError, match="made with another tokenizer"):
        survey(smollm2, corpus, SurveyConfig(**SMALL))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": "best"}, "auto"),
        ({"layers": {"first": 1}}, "Field required"),
        ({"layers": {"first": 1, "second": 1, "adjacent": 2}}, "first=1 must differ"),
        ({"layers": {"first": 1, "second": 2, "adjacent": 0}}, "adjacent=0 lies below first=1"),
        ({"layers": [17, 23]}, r"got survey.layers = \[17, 23\]; write auto or three layers"),
        ({"layers": 17}, r"got survey.layers = 17; write auto or three layers"),
        ({"layers": [17, -23, 18]}, "survey.layers lists -23; layers are numbers from 0 on"),
        ({"layers": [17, True, 18]}, "survey.layers lists True"),
        ({"layers": [17, 17, 18]}, "first=17 must differ"),
        ({"layers": [23, 17, 24]}, "first=23 lies above second=17; exchange them"),
        ({"layers": {"first": 3, "second": 2, "adjacent": 4}}, "first=3 lies above second=2"),
        ({"sequence": 3}, "Extra inputs"),
        ({"length": 1}, "greater than or equal to 4"),
        ({"seed": -1}, "greater than or equal to 0"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        SurveyConfig(**fields)


# --- the default model


def test_the_default_models_induction_layers_are_17_and_23_with_18_beside(smollm2):
    scores = head_scores(smollm2, repeated_random_tokens(smollm2, sequences=4, length=64, seed=0))
    assert choose_layers(scores["induction"].sum(1).tolist(), 6) == LayerChoice(first=17, second=23, adjacent=18)
    assert scores["induction"][17, 3] > 0.5
    assert scores["induction"][:17].max() < 0.1
    assert scores["previous_token"][16, 0] > 0.5
