"""Evaluation of attention models, whatever their kind: each kind's own metrics are in a file of its own."""

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

from pydantic import BaseModel

from crosshead.activations.base_model import LanguageModel
from crosshead.analysis.evaluation import EvaluationConfig
from crosshead.dictionaries.base import Batch, Trainable

__all__ = ["HOMES", "evaluate"]

HOMES = {"qk_diagonal": "qk_metrics", "replacement": "replacement_metrics"}
"""The file beside this one that evaluates each kind; imported only when it is asked for."""


def evaluate(
    module: Trainable,
    heldout: Iterable[Batch],
    config: EvaluationConfig,
    *,
    train: Sequence[Batch] = (),
    model: LanguageModel | None = None,
) -> BaseModel:
    """What the model's kind measures: n_tokens, l0, normalised_mse, dead_fraction and the rest of its own.

    ``train`` is what references are fitted on. Without the base ``model`` nothing is put back into it.
    """
    home: Any = import_module(f"crosshead.analysis.{HOMES[module.config.kind]}")
    return home.evaluate(module, heldout, config, train=train, model=model)
