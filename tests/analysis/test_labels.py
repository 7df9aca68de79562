from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from crosshead.analysis.examples import examples, snippet
from crosshead.analysis.labels import (
    Evidence,
    LabelConfig,
    domain_evidence,
    label_features,
    pair_evidence,
    source_evidence,
    succession_evidence,
)
from crosshead.analysis.moved import Entries, moved
from crosshead.analysis.movers import mover_of
from crosshead.dictionaries.base import Batch, Site
from tests.analysis.test_evaluation import ready
from tests.conftest import byte_tokenizer
from tests.dictionaries.cases import DIMS, weights

CONFIG = LabelConfig(minimum_firings=3, draws=3)
HALF = 12


def repeated_batch(seed: int = 0, n_contexts: int = 6) -> Batch:
    """Random tokens twice; head 0 takes the induction key, head 1 the previous token, head 2 spreads evenly."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.stack([1 + torch.randperm(200, generator=generator)[:HALF] for _ in range(n_contexts)])
    tokens = torch.cat([torch.zeros(n_contexts, 1, dtype=torch.long), half, half], dim=1)
    n_positions = tokens.shape[1]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    heads = torch.zeros(4, n_positions, n_positions)
    for t in range(n_positions):
        induction = t - HALF + 1 if t > HALF else 0
        heads[0, t, induction] = 1.0
        heads[1, t, max(t - 1, 0)] = 1.0
        heads[2:, t, : t + 1] = 1.0 / (t + 1)
    sites = {Site(2, "pattern"): heads.expand(n_contexts, -1, -1, -1),
             Site(2, "resid_in"): torch.randn(n_contexts, n_positions, DIMS.d_model, generator=generator),
             Site(2, "attn_out"): torch.randn(n_contexts, n_positions, DIMS.d_model, generator=generator)}  # fmt: skip
    return Batch(sites, mask, tokens)


def measured(relations=("induction", "previous_token", "duplicate_token", "same_position")):
    """Features 0-7 on the induction head, 8-15 on the previous token, the others spread; the last six on themselves."""
    module, _ = ready("mtc/topk")
    with torch.no_grad():
        module.loadings.zero_()
        module.loadings[1, :8] = -1.0
        module.loadings[2, 8:16] = 1.0
        module.loadings[3, 16:] = 0.2
        module.loadings[0, 18:] = 1.0
        found = moved(mover_of(module, weights()), [repeated_batch()], delimiter=lambda t: t < 0, draws=3)
    live = found.mass.numpy() > 0
    return found, live, label_features({name: pair_evidence(found, name, CONFIG) for name in relations}, live, CONFIG)


def test_hand_built_features_get_their_labels_and_drawn_keys_give_none():
    found, live, labels = measured()
    enough = live & (found.firings.numpy() >= 3)
    feature = np.arange(24)
    assert enough.sum() > 12
    assert labels.of("induction").tolist() == (enough & (feature < 8)).tolist()
    assert labels.of("previous_token").tolist() == (enough & (feature >= 8) & (feature < 16)).tolist()
    assert labels.of("same_position").tolist() == (enough & (feature >= 18)).tolist()
    assert not labels.of("duplicate_token").any()
    counts = labels.counts()
    assert counts["induction"]["expected"] < 0.5
    assert counts["none"]["count"] == int((live & ~labels.holds[:, :-1].any(1)).sum())
    assert counts["none"]["expected"] > 0.8 * live.sum()
    assert counts["induction"]["p_value"] is None, "three draws cannot tell 5%"


def test_every_label_is_absent_from_features_that_fire_too_rarely_or_are_dead():
    found, live, _ = measured()
    rare = LabelConfig(minimum_firings=10_000)
    labels = label_features({"induction": pair_evidence(found, "induction", rare)}, live, rare)
    assert not labels.of("induction").any()
    dead = label_features({"induction": pair_evidence(found, "induction", CONFIG)}, np.zeros(24, dtype=bool), CONFIG)
    assert not dead.holds.any()


def test_thresholds_are_on_the_share_above_chance():
    share, expected = np.array([0.6, 0.6, 0.64, np.nan]), np.array([0.0, 0.5, 0.1, 0.1])
    evidence = Evidence(share, expected, np.zeros((2, 4)), np.ones(4, dtype=bool))
    labels = label_features({"delimiter": evidence}, np.ones(4, dtype=bool), LabelConfig(delimiter=0.6))
    assert labels.of("delimiter").tolist() == [True, False, True, False]
    assert labels.of("succession").tolist() == [False] * 4


def test_a_head_that_looks_at_delimiters_makes_no_feature_a_feature_of_delimiters():
    """Feature 0 fires everywhere alike, on a head that takes nearly all from delimiters, feature 1 on delimiters."""
    delimiter = np.tile(np.arange(20) % 4 == 1, (2, 1))
    context, anchor = np.nonzero(np.ones_like(delimiter))
    on = delimiter[context, anchor]
    value = torch.tensor(np.concatenate([np.full(40, 2.0), np.ones(on.sum())]))
    mass = value * torch.tensor(np.concatenate([1.0 + 50 * on, np.ones(on.sum())]))
    places = (torch.tensor(np.concatenate([part, part[on]])) for part in (context, anchor))
    entries = Entries(*places, torch.tensor([0] * 40 + [1] * int(on.sum())), value, mass, value, value)
    found: Any = SimpleNamespace(entries=entries, firings=torch.tensor([40, 10]))
    evidence = source_evidence(found, delimiter, CONFIG, seed=0)
    assert evidence.share.tolist() == [0.25, 1.0]
    labels = label_features({"delimiter": evidence}, np.ones(2, dtype=bool), CONFIG)
    assert labels.of("delimiter").tolist() == [False, True]
    assert labels.measured().tolist() == [[True], [True]]


class _Masses:
    """What evidence from masses of contexts reads."""

    def __init__(self, context_mass):
        self.context_mass = torch.tensor(context_mass, dtype=torch.float64)


def test_a_feature_of_code_is_told_from_one_of_both_and_chance_is_half():
    domains = ["prose", "code"] * 20
    generator = np.random.default_rng(0)
    mass = generator.random((40, 3)) + 0.5
    mass[::2, 0] = 0.0
    mass[2:, 2] = 0.0
    found = domain_evidence(_Masses(mass), domains, "code", LabelConfig(draws=200), 0)
    assert found.share[0] == 1.0
    assert found.share[1] == pytest.approx(0.5, abs=0.05)
    assert found.enough.tolist() == [True, True, False]
    assert found.null.mean() == pytest.approx(0.5, abs=0.02)


def test_a_feature_that_wants_order_is_told_from_one_that_does_not():
    families = ["days"] * 6 + ["months"] * 6 + ["letters"] * 6
    generator = np.random.default_rng(0)
    mass = generator.random((36, 3)) + 0.5
    mass[18:, 0] *= 0.05
    mass[:, 2] *= np.array([1.0] * 6 + [0.0] * 12 + [1.0] * 6 + [0.0] * 12)
    found = succession_evidence(_Masses(mass), families, LabelConfig(exchanges=200), 0)
    assert found.share[0] > 0.9
    assert found.share[1] == pytest.approx(0.5, abs=0.05)
    assert found.enough.tolist() == [True, True, False]
    assert found.null[:, 0].mean() == pytest.approx(0.5, abs=0.05)
    labels = label_features({"succession": found}, np.ones(3, dtype=bool), LabelConfig())
    assert labels.of("succession").tolist() == [True, False, False]
    assert labels.counts()["succession"]["expected"] < 0.3
    assert labels.counts()["succession"]["p_value"] < 0.05
    mass[18:, 0] = mass[:18, 0]
    found = succession_evidence(_Masses(mass), families, LabelConfig(), 0)
    assert label_features({"succession": found}, np.ones(3, dtype=bool), LabelConfig()).counts()["succession"]["p_value"] == 1
    assert labels.counts()["none"]["p_value"] is None


def test_examples_mark_both_ends_of_the_largest_move():
    found, _, labels = measured()
    records = examples(found, labels, "induction", byte_tokenizer(), n_features=2, n_texts=2)
    assert [len(record["texts"]) for record in records] == [2, 2]
    assert all(record["share"] == pytest.approx(1.0) for record in records)
    assert all("«" in text and "⟦" in text for record in records for text in record["texts"])


def test_a_snippet_is_the_text_with_marks():
    tokenizer = byte_tokenizer()
    row = torch.tensor([0, *tokenizer("Monday, Tuesday", add_special_tokens=False)["input_ids"]])
    assert snippet(row, 1, 9, tokenizer) == "«M»onday, ⟦T⟧uesd"
    assert snippet(row, 9, None, tokenizer) == "Monday, «T»uesd"
    long = torch.tensor([0, *tokenizer("a" + "b" * 40 + "c", add_special_tokens=False)["input_ids"]])
    assert snippet(long, 1, 42, tokenizer) == "«a»bbbbbbbb … bbbbbbbb⟦c⟧"


def test_bytes_that_are_no_text_do_not_break_a_snippet():
    tokenizer = byte_tokenizer()
    row = torch.tensor([0, *tokenizer("é", add_special_tokens=False)["input_ids"]])
    snippet(row, 1, 2, tokenizer).encode("utf-8")
