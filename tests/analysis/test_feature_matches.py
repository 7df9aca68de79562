import copy
import dataclasses

import numpy as np
import pytest
import torch

from crosshead.analysis.feature_matches import match_features, matched_pairs
from crosshead.analysis.moved import moved
from crosshead.analysis.movers import mover_of
from tests.analysis.test_moved import BATCHES, even, measure
from tests.dictionaries.cases import weights


class _Letters:
    def decode(self, tokens):
        return "".join(chr(97 + token) for token in tokens)


def look(module):
    return moved(mover_of(module, weights()), BATCHES, delimiter=even)


def permuted(module, order: torch.Tensor):
    """The same dictionary with its features in another order."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            for axis, size in enumerate(tensor.shape):
                if size == len(order):
                    tensor.copy_(tensor.index_select(axis, order))
    return other


def dense(found) -> np.ndarray:
    table = np.zeros((found.tokens.numel(), len(found.mass)))
    for context, anchor, feature, value in zip(
        *(part.tolist() for part in (found.entries.context, found.entries.anchor, found.entries.feature)),
        found.entries.value.tolist(), strict=True,
    ):  # fmt: skip
        table[context * found.tokens.shape[1] + anchor, feature] = value
    return table / np.maximum(np.linalg.norm(table, axis=0), 1e-300)


def test_a_permutation_is_found_with_cosine_one():
    module, found = measure("mtc/topk")
    order = torch.randperm(module.config.features, generator=torch.Generator().manual_seed(1))
    own, other, cosine = matched_pairs(found, look(permuted(module, order)), 0.9)
    fires = np.flatnonzero(found.firings.numpy() > 0)
    assert sorted(own) == fires.tolist()
    np.testing.assert_array_equal(order.numpy()[other], own)
    np.testing.assert_allclose(cosine, 1.0, atol=1e-5)


def test_pairs_are_the_mutually_nearest_of_the_dense_tables():
    _, first = measure("mtc/topk")
    _, second = measure("mtc-top1/l1")
    table = dense(first).T @ dense(second)
    wanted = {(i, j) for i in range(len(table)) for j in range(table.shape[1])
              if table[i, j] >= 0.3 and table[i].argmax() == j and table[:, j].argmax() == i}  # fmt: skip
    own, other, cosine = matched_pairs(first, second, 0.3)
    assert set(zip(own.tolist(), other.tolist(), strict=True)) == wanted
    assert wanted, "nothing to compare"
    np.testing.assert_allclose(cosine, table[own, other])
    assert (np.diff(cosine) <= 0).all()


def test_effective_tokens_are_those_of_the_mass_by_token():
    _, found = measure("mtc/topk")
    effective, entries = found.effective_tokens(), found.entries
    for feature in range(len(found.mass)):
        mass: dict[int, float] = {}
        for i in torch.nonzero(entries.feature == feature)[:, 0].tolist():
            token = int(found.tokens[entries.context[i], entries.anchor[i]])
            mass[token] = mass.get(token, 0.0) + float(entries.mass[i])
        share = np.array(list(mass.values())) / max(sum(mass.values()), 1e-300)
        if sum(mass.values()) == 0:
            assert np.isnan(effective[feature])
        else:
            assert effective[feature] == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_the_record_compares_pairs_not_dictionaries():
    module, found = measure("mtc/topk")
    order = torch.randperm(module.config.features, generator=torch.Generator().manual_seed(2))
    record = match_features(("a", "b"), found, look(permuted(module, order)), _Letters(), threshold=0.9, n_shown=3,
                            bootstraps=20, seed=0)  # fmt: skip
    assert record["measures"]["breadth"]["interval"] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert record["measures"]["tokens"]["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert len(record["pairs"]) == 3
    for pair in record["pairs"]:
        assert order[pair["features"][1]] == pair["features"][0]
        assert pair["texts"][0] == pair["texts"][1] != ""


def test_a_feature_that_fires_and_moves_nothing_is_no_match():
    _, found = measure("mtc/topk")
    own, _, _ = matched_pairs(found, found, 0.9)
    mass = found.mass.clone()
    mass[int(own[0])] = 0.0
    silent = dataclasses.replace(found, mass=mass)
    assert matched_pairs(found, silent, 0.9)[0].tolist() == own[1:].tolist()
    assert matched_pairs(silent, found, 0.9)[1].tolist() == own[1:].tolist()


def test_dictionaries_read_at_different_ends_are_refused():
    _, first = measure("mtc/topk")
    _, second = measure("attn_out_sae/topk")
    with pytest.raises(ValueError, match="read at the source and at the destination"):
        matched_pairs(first, second, 0.5)


def test_other_texts_are_refused():
    module, first = measure("mtc/topk")
    second = moved(mover_of(module, weights()), BATCHES[:1], delimiter=even)
    with pytest.raises(ValueError, match="different texts"):
        matched_pairs(first, second, 0.5)
