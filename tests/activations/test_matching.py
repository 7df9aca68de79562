import numpy as np
import pytest
import torch

from crosshead.activations.matching import LEVELS, TokenMatches

N, LENGTH = 6, 7


def random_tokens(seed: int, vocabulary: int, n: int = N, length: int = LENGTH) -> torch.Tensor:
    tokens = torch.randint(1, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    return tokens


def brute_force(tokens: torch.Tensor, context: int, position: int) -> tuple[int, set[tuple[int, int]]]:
    """The best level of a position and all its donors there, by looking at every other position."""
    rows = tokens.tolist()
    others = [(c, t) for c in range(len(rows)) if c != context for t in range(1, len(rows[0]))]
    own = rows[context][position - 1 : position + 1]
    pairs = {(c, t) for c, t in others if rows[c][t - 1 : t + 1] == own}
    same = {(c, t) for c, t in others if rows[c][t] == own[1]}
    return next((level, found) for level, found in enumerate((pairs, same, set(others))) if found)


def everywhere(n: int = N, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    contexts, positions = np.meshgrid(np.arange(n), np.arange(1, length), indexing="ij")
    return contexts.ravel(), positions.ravel()


@pytest.mark.parametrize(("seed", "vocabulary"), [(0, 4), (1, 9), (2, 40), (3, 2)])
def test_donors_are_all_those_that_brute_force_finds_and_no_others(seed: int, vocabulary: int):
    tokens = random_tokens(seed, vocabulary)
    matches, (contexts, positions) = TokenMatches(tokens), everywhere()
    generator = torch.Generator().manual_seed(seed)
    drawn: list[set[tuple[int, int]]] = [set() for _ in contexts]
    for _ in range(600):
        donors = matches.draw(contexts, positions, generator)
        for i, donor in enumerate(zip(donors.contexts.tolist(), donors.positions.tolist(), strict=True)):
            drawn[i].add(donor)
    for i, (context, position) in enumerate(zip(contexts.tolist(), positions.tolist(), strict=True)):
        level, expected = brute_force(tokens, context, position)
        assert donors.levels[i] == level
        assert drawn[i] == expected


def test_every_donor_of_a_position_is_as_likely():
    tokens = random_tokens(4, 4)
    n_draws, (level, expected) = 20_000, brute_force(tokens, 2, 3)
    assert level == 0
    assert len(expected) > 2
    ask = np.full(n_draws, 2), np.full(n_draws, 3)
    donors = TokenMatches(tokens).draw(*ask, torch.Generator().manual_seed(0))
    counts = np.unique(donors.contexts * LENGTH + donors.positions, return_counts=True)[1]
    expected_count = n_draws / len(expected)
    assert len(counts) == len(expected)
    assert np.abs(counts - expected_count).max() < 5 * expected_count**0.5


@pytest.mark.parametrize(("seed", "vocabulary"), [(0, 4), (1, 9), (2, 40)])
def test_shares_count_best_levels(seed: int, vocabulary: int):
    tokens = random_tokens(seed, vocabulary)
    best = [brute_force(tokens, c, t)[0] for c, t in zip(*map(np.ndarray.tolist, everywhere()), strict=True)]
    expected = {name: best.count(level) / len(best) for level, name in enumerate(LEVELS)}
    assert TokenMatches(tokens).shares() == pytest.approx(expected)


def test_draws_depend_on_the_generator_and_nothing_else():
    matches, ask = TokenMatches(random_tokens(0, 3)), everywhere()
    first, again, other = (matches.draw(*ask, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.positions, other.positions)
    assert np.array_equal(first.levels, other.levels)


def test_large_token_ids_do_not_run_into_one_another():
    tokens = torch.tensor([[0, 999_999, 5], [0, 5, 999_999], [0, 999_999, 5]])
    donors = TokenMatches(tokens).draw(np.array([0, 1]), np.array([2, 2]), torch.Generator().manual_seed(0))
    assert (donors.contexts[0], donors.positions[0], donors.levels[0]) == (2, 2, 0)
    assert (donors.contexts[1] != 1, donors.positions[1], donors.levels[1]) == (True, 1, 1)


def test_one_context_has_no_others():
    with pytest.raises(ValueError, match="got 1 contexts of 7 tokens; matching takes rows of other contexts"):
        TokenMatches(random_tokens(0, 4, n=1))
