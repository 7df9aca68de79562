"""The explain stage: QK induction features of some runs, explained attention decisions, planted QK layers.

Everything is a function of trained runs, held-out contexts and the base model; the record holds no times or names.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from crosshead.activations.base_model import LanguageModel
from crosshead.analysis.qk_explain import Explanation, compare_deletion, deleted_pattern, explain_attention
from crosshead.analysis.qk_induction import InductionConfig, induction_features
from crosshead.analysis.qk_planted import PlantedQKConfig, planted_trial
from crosshead.attention.qk_diagonal import Module
from crosshead.dictionaries.base import Batch

__all__ = ["Decision", "ExplainConfig", "explained", "explained_decision"]


class Decision(BaseModel):
    """One attention decision to explain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    """The prompt."""
    run: str | None = None
    """The run that explains it; null: the first of ``explain.runs``."""
    head: Annotated[int, Field(ge=0)] | None = None
    """Null: the head of the run that attends most to a key other than beginning-of-text."""
    query: int = -1
    """Position in the prompt, from the end when negative."""
    key: int | None = None
    """Null: the key with the most attention."""


class ExplainConfig(BaseModel):
    """Parameters of the explain stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: tuple[str, ...] = ()
    """Attention runs of QK features whose induction features are looked for."""
    decisions: tuple[Decision, ...] = ()
    """What is explained."""
    top_pairs: Annotated[int, Field(gt=0)] = 8
    """Feature pairs listed, and deleted, per decision."""
    induction: InductionConfig = InductionConfig()
    """How induction features are looked for."""
    planted: tuple[PlantedQKConfig, ...] = (PlantedQKConfig(), PlantedQKConfig(position="rotary"))
    """Planted layers that are trained on."""


def explained(
    modules: Mapping[str, Module],
    seeds: Mapping[str, int],
    model: LanguageModel,
    heldout: Mapping[str, Sequence[Batch]],
    config: ExplainConfig,
) -> dict[str, Any]:
    """``{induction: [...], decisions: [...], planted: [...]}``; ``heldout`` has the contexts of every run's sites."""
    induction = [
        {"run": name, "seed": seeds[name], "features_in_all": module.config.features, "rank": module.config.rank}
        | induction_features(module, model, heldout[name], config.induction)
        for name, module in modules.items()
    ]
    decisions = []
    for decision in config.decisions:
        name = decision.run or next(iter(modules), None)
        if name is None or name not in modules:
            raise ValueError(f"explain.decisions names {name!r}, which is not among explain.runs; add it there")
        decisions.append({"run": name} | explained_decision(modules[name], model, decision, config.top_pairs))
    return {
        "induction": induction,
        "decisions": decisions,
        "planted": [planted_trial(planted) for planted in config.planted],
    }


def explained_decision(module: Module, model: LanguageModel, decision: Decision, top: int) -> dict[str, Any]:
    """The record of one decision: ranked pairs, sum and error, and what deleting the pairs does.

    ``attention_after_predicted`` and ``deletion_difference`` are the same arithmetic as the model's own
    ``attention_after``; what features alone predict of it is under ``predicted_from_features_alone``.
    """
    heads = module.heads.tolist() if decision.head is None else [decision.head]
    found = [explain_attention(module, model, decision.text, head, decision.query, decision.key) for head in heads]
    best = max(found, key=lambda e: (float(e.pattern[e.key]), -e.head))
    deleted = [pair.feature for pair in best.pairs[:top] if pair.contribution > 0]
    after, logits = deleted_pattern(module, model, best, deleted)
    paper, alone = best.predicted_after(module, deleted), best.features_pattern(module, deleted)
    others = _others(best, deleted)
    control = None if others is None else deleted_pattern(module, model, best, others)[0]
    return {
        "text": decision.text,
        "head": best.head,
        "query": best.query,
        "query_token": best.tokens[best.query],
        "key": best.key,
        "key_token": best.tokens[best.key],
        "attention": float(best.pattern[best.key]),
        "attention_predicted": float(best.predicted_pattern[best.key]),
        "score": best.score,
        "predicted": best.predicted,
        "base": best.base,
        "error": best.error,
        "pairs": [pair._asdict() | {"by_centring": pair.by_centring} for pair in best.pairs[:top]],
        "rest": sum(pair.contribution for pair in best.pairs[top:]),
        "n_pairs": len(best.pairs),
        "deleted": deleted,
        "attention_after": float(after[best.key]),
        "attention_after_predicted": float(paper[best.key]),
        "deletion_difference": float((after - paper).abs().max()),
        "predicted_from_features_alone": compare_deletion(module, best, deleted, after)._asdict(),
        "attention_after_others": None if control is None else float(control[best.key]),
        "next_token": _top_token(model, best, logits),
        "strongest_keys": _strongest(best, after, alone),
    }


def _others(explanation: Explanation, deleted: list[int]) -> list[int] | None:
    """As many other features that write for the query, at random; None where there are not so many."""
    rest = sorted({pair.feature for pair in explanation.pairs} - set(deleted))
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0)).tolist()
    return [rest[i] for i in order[: len(deleted)]] if len(rest) >= len(deleted) else None


def _top_token(model: LanguageModel, explanation: Explanation, logits: torch.Tensor) -> str:
    """What the model says next after the deletion."""
    return str(model.tokenizer.decode([int(logits[explanation.query].argmax())]))


def _strongest(explanation: Explanation, after: torch.Tensor, alone: torch.Tensor) -> list[dict[str, Any]]:
    """Keys with the most attention: the model's and the features', before the deletion and after it."""
    columns = {"attention": explanation.pattern, "predicted": explanation.predicted_pattern,
               "attention_after": after, "predicted_after": alone}  # fmt: skip
    order = explanation.pattern.argsort(descending=True, stable=True)[:5].tolist()
    return [{"position": s, "token": explanation.tokens[s], **{name: float(x[s]) for name, x in columns.items()}}
            for s in order]  # fmt: skip
