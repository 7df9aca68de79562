"""Cross-entropy of the base model when heads attend by predicted scores instead of their own.

The predicted scores take the model's own place in its softmax (``activations.rescoring``). Recovered share: against the
same heads attending by the mean score at every distance, which knows position and nothing else (design choice). Queries
and keys that do not count keep their own scores; a predicted row is free up to a constant, and the beginning-of-text
key's predicted score stands beside the others'.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.rescoring import run_rescored
from crosshead.analysis.qk_references import MeanScores
from crosshead.attention.qk_diagonal import Module
from crosshead.dictionaries.base import Batch

__all__ = ["Patching", "patch_scores"]


_LEAST_COST = 0.02


class Patching(BaseModel):
    """Next-token cross-entropies (nats, mean over predicted tokens) and what they say."""

    n_tokens: int
    ce_clean: float
    ce_patched: float
    ce_mean_score: float
    delta_ce: float
    """Patched minus clean."""
    kl: float
    """KL(clean || patched) of the next-token distributions."""
    ce_recovered: float | None
    """(mean score - patched) / (mean score - clean); None where the mean score costs less than 0.02 nats: of a few
    hundred tokens such a difference is noise."""


@torch.no_grad()
def patch_scores(
    module: Module, model: LanguageModel, train: Sequence[Batch], batches: Sequence[Batch], n_contexts: int
) -> Patching:
    """Patch a module's predicted scores into the base model on the first ``n_contexts`` of ``batches``.

    Mean scores are those of ``train``.
    """
    means = MeanScores(module, train)
    totals: dict[str, float] = dict.fromkeys(("clean", "patched", "mean", "kl"), 0.0)
    n_tokens = 0
    for batch in _contexts(batches, n_contexts):
        predicted = batch.mask[:, :-1]
        variants = {"clean": None, "patched": module.scores(batch), "mean": means.scores(batch)}
        clean = None
        for name, scores in variants.items():
            logs = _log_probabilities(module, model, batch, scores)
            loss = -logs.gather(-1, batch.tokens[:, 1:, None])[..., 0] * predicted
            totals[name] += float(loss.double().sum())
            clean = logs if clean is None else clean
            if name == "patched":
                divergence = functional.kl_div(logs, clean, reduction="none", log_target=True).sum(-1)
                totals["kl"] += float((divergence * predicted).double().sum())
        n_tokens += int(predicted.sum())
    if not n_tokens:
        raise ValueError("no held-out positions to patch; raise evaluation.splice_contexts")
    means_of = {name: total / n_tokens for name, total in totals.items()}
    return Patching(
        n_tokens=n_tokens,
        ce_clean=means_of["clean"],
        ce_patched=means_of["patched"],
        ce_mean_score=means_of["mean"],
        delta_ce=means_of["patched"] - means_of["clean"],
        kl=means_of["kl"],
        ce_recovered=_recovered(means_of["clean"], means_of["patched"], means_of["mean"]),
    )


def _recovered(clean: float, patched: float, mean_score: float) -> float | None:
    cost = mean_score - clean
    return None if abs(cost) < _LEAST_COST else (mean_score - patched) / cost


def _log_probabilities(
    module: Module, model: LanguageModel, batch: Batch, scores: Float[Tensor, "B G T T"] | None
) -> Float[Tensor, "B T-1 V"]:
    """Of the next token, with the module's heads attending by ``scores`` (None: by their own)."""
    allowed = module.positions.allowed_with_first(batch.mask)

    def change(own: Tensor) -> Tensor:
        if scores is None:
            return own
        changed = own.clone()
        changed[:, module.heads] = torch.where(allowed, scores.to(own), own[:, module.heads])
        return changed

    logits, _ = run_rescored(model, batch.tokens, module.layer, change)
    return logits[:, :-1].float().log_softmax(-1)


def _contexts(batches: Iterable[Batch], n_contexts: int) -> Iterable[Batch]:
    """Context by context, the first ``n_contexts``."""
    for batch in batches:
        for i in range(len(batch.mask)):
            if n_contexts <= 0:
                return
            one = slice(i, i + 1)
            yield Batch({site: x[one] for site, x in batch.sites.items()}, batch.mask[one], batch.tokens[one])
            n_contexts -= 1
