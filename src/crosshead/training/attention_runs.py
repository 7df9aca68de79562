"""Runs of attention models: entries under ``attention_runs``, over their kind's defaults under ``attention_models``."""

from crosshead.attention.registry import KINDS, config_class
from crosshead.training.runs import Registry

__all__ = ["ATTENTION"]

ATTENTION = Registry(KINDS, config_class, "attention_runs", "attention_models")
