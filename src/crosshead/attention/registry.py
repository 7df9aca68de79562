"""Attention models by kind. A kind is the name of its file here; the file is imported only when it is asked for."""

from importlib import import_module
from pathlib import Path
from typing import Any

from crosshead.dictionaries.base import DictionaryConfig, ModelDims, Trainable, read_description

__all__ = ["KINDS", "build", "config_class", "load_attention_model"]

KINDS = ("qk_diagonal", "replacement")


def _module(kind: str) -> Any:
    if kind not in KINDS:
        raise ValueError(f"unknown attention model {kind!r}; choose one of {', '.join(KINDS)}")
    return import_module(f"crosshead.attention.{kind}")


def config_class(kind: str) -> type[DictionaryConfig]:
    """The Config class of an attention model; ValueError for an unknown kind."""
    return _module(kind).Config


def build(config: DictionaryConfig, dims: ModelDims) -> Trainable:
    """An unstarted model of the config's kind."""
    return _module(config.kind).Module(config, dims)


def load_attention_model(path: Path | str) -> Trainable:
    """Load an attention model of any kind from the directory of its run; ValueError when it is damaged."""
    config = read_description(path)["config"]
    kind = config.get("kind") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{Path(path) / 'dictionary.json'} names the attention model {kind!r}, this version has "
                         f"{', '.join(KINDS)}; train the run again")  # fmt: skip
    return _module(kind).Module.load(path)
