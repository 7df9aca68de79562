"""Induction features among QK features: a query side that fires on X, a key side that fires on what follows X.

Shape legend: n contexts, T positions (t query, s key), F features.

A feature's mass at a pair is what it adds to the score, summed over heads, where positive. Its induction share is the
mass at keys right after an earlier occurrence of the query's token, over all mass of queries that have such a key;
expected is the same with the mass of every query spread evenly over its keys. Measured on repeated random tokens, where
nothing else repeats, and on held-out text. On text, every query side is also paired with the key sides of other
features (permuted pairs): a pair counts as a pair when its own key side gives a larger share than these.

After Jermyn et al., Progress on Attention (2025); the shares and the permutation are design choices.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.capture import capture
from crosshead.activations.survey import position_kinds, repeated_random_tokens
from crosshead.analysis.qk_contributions import Contributions, contributions
from crosshead.analysis.qk_sides import describe_side, same_grain
from crosshead.attention.qk_diagonal import Module
from crosshead.dictionaries.base import Batch

__all__ = ["InductionConfig", "induction_features", "induction_shares", "repeated_batch"]

_WORDS_AROUND = 8


class InductionConfig(BaseModel):
    """How induction features are looked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequences: Annotated[int, Field(gt=0)] = 8
    """Contexts of repeated random tokens."""
    length: Annotated[int, Field(ge=4)] = 64
    """Random tokens before they repeat; fewer where the rotary tables are shorter."""
    text_contexts: Annotated[int, Field(gt=0)] = 16
    """Held-out contexts."""
    top: Annotated[int, Field(gt=0)] = 10
    """Clearest features that are described."""
    permutations: Annotated[int, Field(gt=0)] = 40
    """Other key sides that each of them is paired with."""
    minimum_firings: Annotated[int, Field(gt=0)] = 10
    """Positions of the repeated tokens at which both sides must fire."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes random tokens and permutations."""


class _Shares:
    """Mass at induction keys, expected there, and in all, of queries that have such keys."""

    def __init__(self, n_features: int):
        self.sums = torch.zeros(3, n_features, dtype=torch.float64)

    def add(self, feature: int, mass: Float[Tensor, "T T"], wanted: Bool[Tensor, "T T"], allowed: Tensor) -> None:
        rows = mass * (allowed & wanted.any(-1, keepdim=True))
        chance = wanted.sum(-1) / allowed.sum(-1).clamp(min=1)
        sums = (rows * wanted).sum(), (rows.sum(-1) * chance).sum(), rows.sum()
        self.sums[:, feature] += torch.stack(sums).double().cpu()

    def shares(self) -> tuple[Tensor, Tensor]:
        """Share and expected share [F]; NaN where there was no mass."""
        within, expected, total = self.sums
        return within / total, expected / total


def repeated_batch(module: Module, model: LanguageModel, config: InductionConfig) -> Batch:
    """Repeated random tokens, with what the module reads."""
    length = config.length
    if module.positions.rotates:
        length = min(length, (len(module.positions.cos) - 1) // 2)
    tokens = repeated_random_tokens(model, config.sequences, length, config.seed)
    sites = capture(model, tokens, module.sites)
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    mask[:, 0] = False
    device = module.heads.device
    return Batch({site: x.float().to(device) for site, x in sites.items()}, mask.to(device), tokens.to(device))


@torch.no_grad()
def induction_shares(module: Module, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Share, expected share and number of positions with both sides' firings (the smaller of the two), all [F]."""
    found = _Shares(module.config.features)
    firings = torch.zeros(2, module.config.features, dtype=torch.long)
    for batch in batches:
        written = contributions(module, batch)
        allowed, wanted = _kinds(module, batch)
        firings += torch.stack([(x > 0).sum((0, 1)) for x in (written.query_active, written.key_active)]).cpu()
        for feature in written.features():
            for c in range(len(batch.mask)):
                found.add(feature, _mass(written, c, feature), wanted[c], allowed[c])
    return *found.shares(), firings.amin(0)


def _kinds(module: Module, batch: Batch) -> tuple[Bool[Tensor, "B T T"], Bool[Tensor, "B T T"]]:
    allowed = module.positions.allowed(batch.mask)[:, 0]
    return allowed, position_kinds(batch.tokens.cpu())["induction"].to(allowed.device) & allowed


def _mass(written: Contributions, context: int, feature: int, key_feature: int | None = None) -> Float[Tensor, "T T"]:
    return written.of_feature(context, feature, key_feature).clamp(min=0).sum(-1)


@torch.no_grad()
def induction_features(
    module: Module, model: LanguageModel, text: Sequence[Batch], config: InductionConfig
) -> dict[str, Any]:
    """``{n_live, n_induction, heads, features: [...]}``: counts, and the clearest features described.

    ``n_induction``: features whose share on repeated tokens, above what is expected, is at least 0.3 of what is left,
    as for the label induction of dictionaries (``analysis.labels``).
    """
    share, expected, firings = induction_shares(module, [repeated_batch(module, model, config)])
    on_text, expected_on_text, _ = induction_shares(module, text)
    enough = (firings >= config.minimum_firings) & share.isfinite()
    score = ((share - expected) / (1 - expected).clamp(min=1e-9)).nan_to_num(-1.0).masked_fill(~enough, -1.0)
    order = score.argsort(descending=True, stable=True).tolist()
    chosen = [i for i in order[: config.top] if score[i] > 0]
    read = [(batch, contributions(module, batch)) for batch in text]
    decode = _Decoder(model)
    everywhere = Counter(decode(token) for batch in text for token in batch.tokens[batch.mask].tolist())
    alive = [i for i in range(module.config.features) if bool(enough[i])]
    described = []
    for i in chosen:
        others = _permuted(i, alive, config)
        described.append({
            "feature": i,
            "score": float(score[i]),
            "share_random": float(share[i]),
            "expected_random": float(expected[i]),
            "share_text": _number(on_text[i]),
            "expected_text": _number(expected_on_text[i]),
            **_against_permuted(module, read, i, others, _number(on_text[i])),
            **_sides(module, read, i, decode, everywhere),
        })  # fmt: skip
    return {
        "n_live": int(enough.sum()),
        "n_induction": int((score >= 0.3).sum()),
        "heads": module.heads.tolist(),
        "features": described,
    }


def _number(value: Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None


class _Decoder:
    """Token texts, each decoded once."""

    def __init__(self, model: LanguageModel):
        self._tokenizer, self._known = model.tokenizer, dict[int, str]()

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = str(self._tokenizer.decode([token]))
        return self._known[token]


def _permuted(feature: int, alive: Sequence[int], config: InductionConfig) -> list[int]:
    others = torch.tensor([i for i in alive if i != feature], dtype=torch.long)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + feature)
    return others[torch.randperm(len(others), generator=generator)[: config.permutations]].tolist()


def _against_permuted(
    module: Module, read: Sequence[tuple[Batch, Contributions]], feature: int, others: Sequence[int], own: float | None
) -> dict[str, Any]:
    """The share on text of the query side with other features' key sides."""
    found = _Shares(len(others))
    for batch, written in read:
        allowed, wanted = _kinds(module, batch)
        for j, other in enumerate(others):
            for c in range(len(batch.mask)):
                found.add(j, _mass(written, c, feature, other), wanted[c], allowed[c])
    shares = [float(x) for x in found.shares()[0] if bool(x.isfinite())]
    above = None if own is None or not shares else (1 + sum(x >= own for x in shares)) / (1 + len(shares))
    return {
        "permuted_mean": sum(shares) / len(shares) if shares else None,
        "permuted_largest": max(shares, default=None),
        "n_permuted": len(shares),
        "p_value": above,
    }


def _sides(
    module: Module, read: Sequence[tuple[Batch, Contributions]], feature: int, decode: _Decoder, everywhere: Counter
) -> dict[str, Any]:
    """What both sides respond to on text, how alike the query's token and the one before the key are, and examples."""
    query, key, before, alike = (defaultdict[str, float](float) for _ in range(4))
    pairs: list[tuple[float, Batch, int, int, int]] = []
    for batch, written in read:
        for c in range(len(batch.mask)):
            tokens = [decode(token) for token in batch.tokens[c].tolist()]
            for t in torch.nonzero(written.query_active[c, :, feature]).flatten().tolist():
                query[tokens[t]] += float(written.query_active[c, t, feature])
            for s in torch.nonzero(written.key_active[c, :, feature]).flatten().tolist():
                key[tokens[s]] += float(written.key_active[c, s, feature])
                before[tokens[s - 1]] += float(written.key_active[c, s, feature])
            mass = _mass(written, c, feature)
            for t, s in torch.nonzero(mass).tolist():
                alike[same_grain(tokens[t], tokens[s - 1])] += float(mass[t, s])
            best = int(mass.argmax())
            if float(mass.flatten()[best]) > 0:
                pairs.append((float(mass.flatten()[best]), batch, c, *divmod(best, mass.shape[1])))
    total = max(sum(alike.values()), 1e-30)
    examples = [_example(batch, c, t, s, decode) for _, batch, c, t, s in sorted(pairs, key=lambda p: -p[0])[:3]]
    return {
        "query": describe_side(query, everywhere),
        "key": describe_side(key, everywhere),
        "before_key": describe_side(before, everywhere),
        "alike": {name: alike[name] / total for name in ("token", "word", "substring", "word class", "none")},
        "examples": examples,
    }


def _example(batch: Batch, context: int, query: int, key: int, decode: _Decoder) -> dict[str, str]:
    """Words around the key, the key itself in brackets; likewise the query."""

    def around(place: int) -> str:
        tokens = batch.tokens[context].tolist()
        left = "".join(map(decode, tokens[max(1, place - _WORDS_AROUND) : place]))
        right = "".join(map(decode, tokens[place + 1 : place + 1 + _WORDS_AROUND // 2]))
        return f"{left}[{decode(tokens[place])}]{right}"

    return {"key": around(key), "query": around(query)}
