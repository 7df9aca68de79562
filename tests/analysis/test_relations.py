import torch

from crosshead.analysis.relations import RELATIONS, delimiters, pair_weights
from tests.conftest import byte_tokenizer


def relations_by_definition(tokens: list[int], mask: list[bool], plain: list[bool], t: int, s: int) -> set[str]:
    if not (mask[t] and mask[s] and s <= t):
        return set()
    kinds = set()
    if 1 < s < t and tokens[s - 1] == tokens[t]:
        kinds.add("induction")
    if s == t - 1:
        kinds.add("previous_token")
    if s < t and tokens[s] == tokens[t]:
        kinds.add("duplicate_token")
    if s == t:
        kinds.add("same_position")
    if not kinds:
        kinds.add("other")
    if plain[s]:
        kinds.add("delimiter")
    return kinds


def setup(draws: int = 1):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 5, (13,), generator=generator)
    mask = torch.ones(13, dtype=torch.bool)
    mask[0] = mask[11] = mask[12] = False
    plain = tokens == 2
    return tokens, mask, plain, pair_weights(tokens, mask, plain, draws, generator)


def test_relations_follow_their_definitions():
    tokens, mask, plain, weights = setup()
    rows = tokens.tolist(), mask.tolist(), plain.tolist()
    for t in range(13):
        for s in range(13):
            found = {name for name, value in zip(RELATIONS, weights.within[t, s], strict=True) if value}
            assert found == relations_by_definition(*rows, t, s), (t, s)


def test_expected_shares_count_keys_and_draws_agree_in_the_mean():
    tokens, mask, plain, weights = setup(draws=400)
    rows = tokens.tolist(), mask.tolist(), plain.tolist()
    for t in range(1, 11):
        keys = [relations_by_definition(*rows, t, s) for s in range(1, t + 1)]
        for c, name in enumerate(RELATIONS):
            share = sum(name in kinds for kinds in keys) / t
            assert abs(float(weights.expected[t, c]) - share) < 1e-6
            assert bool(weights.possible[t, c]) == (share > 0)
            assert abs(float(weights.null[:, t, :, c].mean()) - share) < 0.04


def test_columns_lie_in_the_order_that_moved_mass_reads_them():
    weights = setup(draws=2)[-1]
    columns = weights.columns().unflatten(-1, (5, len(RELATIONS)))
    torch.testing.assert_close(columns[:, :, 0], weights.within)
    torch.testing.assert_close(columns[:, 3, 1], weights.possible)
    torch.testing.assert_close(columns[:, 3, 2], weights.expected)
    torch.testing.assert_close(columns[:, :, 4], weights.null[1])


def test_delimiters_hold_no_letter_and_no_digit():
    tokenizer = byte_tokenizer()
    text = "a, b\n(7)"
    tokens = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert delimiters(tokens, tokenizer)[0].tolist() == [not c.isalnum() for c in text]
