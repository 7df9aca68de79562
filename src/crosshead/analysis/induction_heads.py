"""Induction heads among the heads of an attention replacement layer, on repeated random tokens.

Shape legend: B contexts, T positions, G groups that share a pattern (the heads themselves where they are plain).

A group's induction score is its mean attention on the positions after an earlier occurrence of the current token
(Olsson et al. 2022), over queries that have one. Control: the same patterns, read as if the tokens of the repetition
came in another order, so that "the position after" is a random earlier one. A group is an induction head where its
score is at least ``LEAST`` and three times its control. As many as that control finds by the same rule are found by
chance.

Intervention: what the induction heads write at the repetition is taken out of the base model's attention output, and
the next-token loss there is compared with taking out as many other heads, the largest ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.capture import capture
from crosshead.activations.splice import splice
from crosshead.activations.survey import position_kinds, repeated_random_tokens
from crosshead.analysis.replacement_metrics import each_pattern
from crosshead.analysis.rules import COHERENT_LIFT
from crosshead.attention.replacement import Module
from crosshead.dictionaries.base import Batch, Site

__all__ = ["LEAST", "find_induction_heads", "induction_scores"]

LEAST = 0.1
"""Least induction score of an induction head."""


@torch.no_grad()
def find_induction_heads(
    module: Module, model: LanguageModel, *, sequences: int, length: int, seed: int
) -> dict[str, Any]:
    """Score every group, list the induction heads and take them out of the model; see the module's text."""
    tokens = repeated_random_tokens(model, sequences, length, seed)
    batch = _captured(module, model, tokens)
    after, shuffled = _after_earlier(tokens), _after_earlier(_reordered(tokens, seed))
    scores = torch.zeros(2, module.config.groups, dtype=torch.float64)
    for groups, pattern in each_pattern(module, batch):
        scores[0, groups] = induction_scores(pattern, after.to(pattern.device))
        scores[1, groups] = induction_scores(pattern, shuffled.to(pattern.device))
    sizes = _group_energy(module, batch)
    live = sizes > 1e-6 * sizes.sum()
    own, control = (_passing(scores[i], scores[1 - i]) & live for i in (0, 1))
    found = torch.nonzero(own)[:, 0].tolist()
    found.sort(key=lambda g: -float(scores[0, g]))
    base = capture(model, tokens, [Site(module.layer, "pattern")])[Site(module.layer, "pattern")]
    return {
        "n_groups": len(live),
        "n_live": int(live.sum()),
        "n_tokens": int(batch.n_counted),
        "n_found": len(found),
        "n_found_by_control": int(control.sum()),
        "heads": [{"group": g, "score": _round(scores[0, g]), "control": _round(scores[1, g])} for g in found[:20]],
        "best_score": _round(scores[0][live].max()) if live.any() else 0.0,
        "median_score": _round(scores[0][live].median()) if live.any() else 0.0,
        "base_scores": [_round(score) for score in induction_scores(base.cpu(), after)],
        "removal": _removal(module, model, batch, found, sizes),
    }


def induction_scores(pattern: Float[Tensor, "B g T T"], after: Bool[Tensor, "B T T"]) -> Float[Tensor, " g"]:
    """Mean attention on the keys of ``after``, over queries that have one."""
    queries = after.any(-1)
    on_keys = (pattern * after[:, None]).sum(-1)
    return (on_keys * queries[:, None]).double().sum((0, 2)).cpu() / int(queries.sum().clamp(min=1))


def _passing(score: Tensor, control: Tensor) -> Tensor:
    return (score >= LEAST) & (score >= COHERENT_LIFT * control)


def _after_earlier(tokens: Int[Tensor, "B T"]) -> Bool[Tensor, "B T T"]:
    return position_kinds(tokens)["induction"]


def _reordered(tokens: Int[Tensor, "B T"], seed: int) -> Int[Tensor, "B T"]:
    """The tokens of the repetition in another order: no two neighbours of the first half follow one another."""
    half = (tokens.shape[1] - 1) // 2
    order = torch.randperm(half, generator=torch.Generator().manual_seed(seed + 1))
    return torch.cat([tokens[:, : 1 + half], tokens[:, 1 + half :][:, order]], 1)


def _captured(module: Module, model: LanguageModel, tokens: Int[Tensor, "B T"]) -> Batch:
    found = {site: tensor.float() for site, tensor in capture(model, tokens, list(module.sites)).items()}
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    mask[:, 0] = False
    device = module.out.device
    return Batch(found, mask, tokens).to(device)


def _group_energy(module: Module, batch: Batch) -> Float[Tensor, " G"]:
    """Mean square of what every group's heads write."""
    sizes = module.sizes(module.encode(batch))[batch.mask.flatten()].double().square().mean(0)
    return sizes.view(module.config.groups, -1).sum(1).cpu()


def _removal(
    module: Module, model: LanguageModel, batch: Batch, found: Sequence[int], sizes: Tensor
) -> dict[str, Any] | None:
    """Next-token losses on the repetition with all heads, without those found, and without as many others."""
    if not found or len(found) > len(sizes) // 2:
        return None
    rest = sizes.clone()
    rest[list(found)] = -1.0
    others = rest.topk(len(found)).indices.tolist()
    where = torch.zeros_like(batch.mask)
    where[:, (batch.mask.shape[1] + 1) // 2 :] = True
    losses = {"clean": _loss(model, batch, {}, where)}
    for name, groups in (("without_found", found), ("without_others", others)):
        site = module.target_sites[0]
        written = _written(module, batch, groups) / module.target_scale
        losses[name] = _loss(model, batch, {site: batch[site] - written}, where)
    return {name: round(loss, 6) for name, loss in losses.items()}


def _written(module: Module, batch: Batch, groups: Sequence[int]) -> Float[Tensor, "B T D"]:
    """What some groups write, in normalised units."""
    z = module.encode(batch)
    kept = torch.zeros(module.config.groups, module.width, dtype=torch.bool, device=z.device)
    kept[list(groups)] = True
    return ((z * kept.flatten()) @ module.out).view(*batch.mask.shape, -1)


def _loss(model: LanguageModel, batch: Batch, replacements: dict[Site, Tensor], where: Tensor) -> float:
    logits = splice(model, batch.tokens, replacements, where)[:, :-1].float()
    losses = cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:].to(logits.device), reduction="none")
    counted = where[:, :-1].to(losses.device)
    return float((losses * counted).double().sum() / counted.sum())


def _round(value: Tensor | float) -> float:
    return round(float(value), 6)
