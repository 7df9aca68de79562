"""Why a head attends where it does at one position: feature pairs, ranked, that add up to a score.

Shape legend: F features, T positions of the prompt.

The score of a key, centred over the query's counted keys, is what the features write there less what they write on
average, plus what no feature writes (the base, where the model has one), plus an error: the part of the real score
that the features miss. An explanation states all of it.

Deleting feature pairs takes what they write out of the model's own scores and lets its softmax do the rest
(``deleted_pattern``, in the running model). Two predictions stand beside it:

- *same arithmetic* (``predicted_after``): the same subtraction from the same real scores, on paper. It has to agree to
  rounding whatever the features are: it tests the intervention and says nothing of the features.
- *from features alone* (``features_pattern``): the pairs are taken out of the predicted scores, those of the features
  and of the base where there is one. It is as far from the model as the error at every key makes it
  (``compare_deletion``).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.rescoring import run_rescored
from crosshead.activations.texts import read_texts
from crosshead.analysis.qk_contributions import contributions
from crosshead.attention.qk_diagonal import Module
from crosshead.dictionaries.base import Batch

__all__ = ["Deletion", "Explanation", "FeaturePair", "compare_deletion", "deleted_pattern", "explain_attention"]


class FeaturePair(NamedTuple):
    """One feature's share of a score."""

    feature: int
    contribution: float
    """To the centred score of the key that is explained."""
    query_activation: float
    key_activation: float

    @property
    def by_centring(self) -> bool:
        """Whether it writes at other keys only."""
        return self.key_activation == 0


@dataclass(frozen=True)
class Explanation:
    """One attention decision. Scores are after the layer's scale, centred over the query's counted keys."""

    tokens: list[str]
    head: int
    query: int
    key: int
    score: float
    """Real, of the key."""
    predicted: float
    """By the features and the base."""
    base: float
    """What no feature writes."""
    error: float
    """score - predicted."""
    pairs: list[FeaturePair]
    """Features that write at any key of the query, largest contribution first; with ``base`` they sum to ``predicted``.

    One that is not active at the key that is explained contributes by centring: it raises other keys less, or lowers
    them.
    """
    written: Float[Tensor, "F T"]
    """What every feature writes into the query's scores, the beginning-of-text key's (0) included; not centred."""
    scores: Float[Tensor, " T"]
    """Real scores of the query; -inf at keys that it may not attend to."""
    predicted_scores: Float[Tensor, " T"]
    """By the features and the base, up to a constant; -inf at keys that it may not attend to."""
    pattern: Float[Tensor, " T"]
    """Real attention of the query."""
    predicted_pattern: Float[Tensor, " T"]
    """Attention by predicted scores."""
    batch: Batch
    """The prompt as the module reads it."""

    def predicted_after(self, module: Module, features: list[int]) -> Float[Tensor, " T"]:
        """The query's attention once these features' pairs are taken out of its real scores: the same arithmetic."""
        return self._without(module, self.scores, features)

    def features_pattern(self, module: Module, without: list[int]) -> Float[Tensor, " T"]:
        """The query's attention by predicted scores without these features' pairs: from features alone."""
        return self._without(module, self.predicted_scores, without)

    def _without(self, module: Module, scores: Float[Tensor, " T"], features: list[int]) -> Float[Tensor, " T"]:
        changed = torch.where(scores.isfinite(), scores - self.written[features].sum(0), 0.0)
        return _pattern_row(module, changed, scores.isfinite(), self.head)

    def table(self, top: int = 10) -> str:
        """The explanation in lines of text."""
        head = f"head {self.head}: {self.tokens[self.query]!r} (position {self.query}) attends to "
        head += f"{self.tokens[self.key]!r} (position {self.key}) with {float(self.pattern[self.key]):.1%}"
        lines = [head, f"centred score {self.score:+.2f} = features {self.predicted - self.base:+.2f} + base "
                       f"{self.base:+.2f} + error {self.error:+.2f}"]  # fmt: skip
        for pair in self.pairs[:top]:
            sides = f"query {pair.query_activation:.2f}, key {pair.key_activation:.2f}"
            how = ", by centring" if pair.by_centring else ""
            lines.append(f"  feature {pair.feature:5d}  {pair.contribution:+.3f}  ({sides}{how})")
        return "\n".join(lines)


@torch.no_grad()
def explain_attention(
    module: Module, model: LanguageModel, text: str, head: int, query: int = -1, key: int | None = None
) -> Explanation:
    """Explain where ``head`` attends from one position of a text (position 0 is the beginning-of-text token).

    ``query`` counts from the end when negative. ``key`` is by default the one, other than beginning-of-text, with the
    most attention. ValueError for a head that the module does not describe, a position out of range, or a key that the
    query cannot attend to.
    """
    batch = read_texts(model, [text], module.sites)
    heads, length = module.heads.tolist(), batch.mask.shape[1]
    if head not in heads:
        raise ValueError(f"head {head} is not among the heads that these features describe "
                         f"({', '.join(map(str, heads))}); choose one of them")  # fmt: skip
    place = query + length if query < 0 else query
    if not 1 <= place < length:
        raise ValueError(f"query {query} is out of range; the text has positions 1 to {length - 1}")
    g = heads.index(head)
    allowed = module.positions.allowed_with_first(batch.mask)[0, 0, place]
    counted = module.positions.allowed(batch.mask)[0, 0, place]
    true, predicted = (scores[0, g, place] for scores in (module.true_scores(batch), module.scores(batch)))
    pattern, predicted_pattern = (_pattern_row(module, x, allowed, head) for x in (true, predicted))
    chosen = int((pattern * counted).argmax()) if key is None else key
    if not (0 <= chosen < length and bool(counted[chosen])):
        raise ValueError(f"position {chosen} is no key of query {place}; choose one from 1 to {place}")
    found = contributions(module, batch)
    written = found.at_query(0, place, g)
    centred = written[:, chosen] - (written * counted).sum(1) / counted.sum()
    score, whole = (float(x[chosen] - (x * counted).sum() / counted.sum()) for x in (true, predicted))
    on = torch.nonzero(written.abs().sum(1)).flatten().tolist()
    pairs = [FeaturePair(i, float(centred[i]), float(found.query_active[0, place, i]),
                         float(found.key_active[0, chosen, i])) for i in on]  # fmt: skip
    pairs.sort(key=lambda pair: (-pair.contribution, pair.feature))
    features = float(centred.sum())
    tokens = [str(model.tokenizer.decode([token])) for token in batch.tokens[0].tolist()]
    return Explanation(
        tokens, head, place, chosen, score, whole, whole - features, score - whole, pairs, written,
        true.masked_fill(~allowed, -torch.inf), predicted.masked_fill(~allowed, -torch.inf), pattern,
        predicted_pattern, batch,
    )  # fmt: skip


def _pattern_row(module: Module, scores: Float[Tensor, " T"], allowed: Tensor, head: int) -> Float[Tensor, " T"]:
    heads = torch.tensor([head], device=scores.device)
    log = module.positions.log_pattern(scores[None, None, None], allowed[None, None, None], heads)[0, 0, 0]
    return log.exp() * allowed


@torch.no_grad()
def deleted_pattern(
    module: Module, model: LanguageModel, explanation: Explanation, features: list[int]
) -> tuple[Float[Tensor, " T"], Float[Tensor, "T V"]]:
    """The query's attention, and the logits, of the running model without these features' pairs in its scores."""
    removed = explanation.written[features].sum(0)

    def change(scores: Tensor) -> Tensor:
        changed = scores.clone()
        changed[0, explanation.head, explanation.query] -= removed.to(scores)
        return changed

    logits, pattern = run_rescored(model, explanation.batch.tokens, module.layer, change)
    return pattern[0, explanation.head, explanation.query], logits[0]


class Deletion(NamedTuple):
    """What deleting pairs does to a query's attention: by the features alone, and in the model.

    A distance is the total variation: half the summed differences of two patterns, from 0 to 1.
    """

    attention_after: float
    """On the key that is explained, by the features alone."""
    fall: float
    """Of attention on that key, by the features alone."""
    model_fall: float
    """The same in the running model."""
    distance: float
    """Between the features' pattern and the model's, both after the deletion."""
    distance_before: float
    """Between the two before it."""
    model_distance: float
    """Between the model's own patterns before and after: the error of a prediction that nothing changes."""


def compare_deletion(
    module: Module, explanation: Explanation, features: list[int], after: Float[Tensor, " T"]
) -> Deletion:
    """What features alone say of deleting pairs, beside ``after``, the running model's pattern without them."""
    key, before, predicted = explanation.key, explanation.pattern, explanation.predicted_pattern
    predicted_after = explanation.features_pattern(module, features)
    return Deletion(
        float(predicted_after[key]), float(predicted[key] - predicted_after[key]), float(before[key] - after[key]),
        _total_variation(predicted_after, after), _total_variation(predicted, before), _total_variation(before, after),
    )  # fmt: skip


def _total_variation(first: Float[Tensor, " T"], second: Float[Tensor, " T"]) -> float:
    return float((first - second).abs().sum()) / 2
