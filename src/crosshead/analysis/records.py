"""The metrics record of one training run: what ``reports/runs/<run>.json`` holds.

No times, host names or ids: two runs of the same parameters write the same bytes.
"""

from collections.abc import Mapping
from typing import Any

from crosshead.analysis.evaluation import Evaluation
from crosshead.analysis.splicing import Splicing
from crosshead.dictionaries.base import Dictionary
from crosshead.training.runs import Run

__all__ = ["SCHEMA", "run_record"]

SCHEMA = 1


def run_record(
    run: Run,
    module: Dictionary,
    evaluation: Evaluation,
    splicing: Splicing,
    *,
    tokens_trained: int,
    control_detail: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Flat figures first, the full evaluation and splicing records beside them.

    ``control_detail`` is what the control says of the held-out split: of matched_tokens, the share of its positions
    whose donor has the same current and previous token (pair), the same current token only, or neither (any).
    """
    config = module.config
    sparsity = config.sparsity.model_dump(mode="json")
    return {
        "schema": SCHEMA,
        "run": run.name,
        "series": run.series,
        "family": run.family,
        "architecture": config.kind,
        "layers": list(config.layers),
        "target": "+".join(dict.fromkeys(site.name for site in module.target_sites)),
        "features": config.features,
        "heads_per_feature": getattr(config, "heads_per_feature", None),
        "sparsity": sparsity,
        "sparsity_value": float(sparsity.get("k", sparsity.get("coefficient", 0.0))),
        "seed": run.seed,
        "control": run.control,
        "control_detail": None if control_detail is None else dict(control_detail),
        "start": _start(config),
        "learning_rate": run.schedule.learning_rate,
        "steps": run.schedule.steps,
        "tokens_trained": tokens_trained,
        "parameters": sum(p.numel() for p in module.parameters()),
        "l0": evaluation.l0,
        "normalised_mse": evaluation.normalised_mse,
        "ce_recovered": splicing.ce_recovered,
        "ce_recovered_zero": splicing.ce_recovered_zero,
        "dead_fraction": evaluation.dead_fraction,
        "n_tokens": evaluation.n_tokens,
        "evaluation": evaluation.model_dump(mode="json", exclude={"feature_counts"}),
        "splicing": splicing.model_dump(mode="json"),
    }


def _start(config: Any) -> str | None:
    """Where training began, in words; None for architectures that have one start only."""
    start, tokens = getattr(config, "start", None), getattr(config, "start_tokens", None)
    return start if start != "value_maps" or tokens is None else f"{start}, {tokens} tokens"
