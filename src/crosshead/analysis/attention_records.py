"""The metrics record of one attention run: what ``reports/<profile>/attention/<run>.json`` holds.

No times, host names or ids: two runs of the same parameters write the same bytes.
"""

from typing import Any

from pydantic import BaseModel

from crosshead.dictionaries.base import Trainable
from crosshead.training.runs import Run

__all__ = ["SCHEMA", "attention_record"]

SCHEMA = 1


def attention_record(run: Run, module: Trainable, evaluation: BaseModel, *, tokens_trained: int) -> dict[str, Any]:
    """Flat figures first, configuration and the kind's whole evaluation beside them."""
    config = module.config
    measured = evaluation.model_dump(mode="json")
    settings = config.model_dump(mode="json")
    sparsity = settings.get("sparsity") or {}
    return {
        "schema": SCHEMA,
        "run": run.name,
        "series": run.series,
        "family": run.family,
        "architecture": config.kind,
        "layers": list(config.layers),
        "features": config.features,
        "sparsity": sparsity or None,
        "sparsity_value": float(sparsity.get("k", sparsity.get("coefficient", 0.0))),
        "seed": run.seed,
        "control": run.control,
        "learning_rate": run.schedule.learning_rate,
        "steps": run.schedule.steps,
        "tokens_trained": tokens_trained,
        "parameters": sum(p.numel() for p in module.parameters()),
        "l0": measured["l0"],
        "normalised_mse": measured["normalised_mse"],
        "ce_recovered": (measured.get("patching") or measured).get("ce_recovered"),
        "ce_recovered_zero": measured.get("ce_recovered_zero"),
        "dead_fraction": measured["dead_fraction"],
        "n_tokens": measured["n_tokens"],
        "config": settings,
        "evaluation": measured,
    }
