"""Architectures by kind. A kind is the name of its file here; the file is imported only when it is asked for."""

from importlib import import_module
from pathlib import Path
from typing import Any

from crosshead.dictionaries.base import Dictionary, DictionaryConfig, ModelDims, read_description

__all__ = ["KINDS", "build", "config_class", "load_dictionary"]

KINDS = ("attn_out_sae", "joint_mtc", "mtc", "sae_best_head", "value_sae")


def _module(kind: str) -> Any:
    if kind not in KINDS:
        raise ValueError(f"unknown architecture {kind!r}; choose one of {', '.join(KINDS)}")
    return import_module(f"crosshead.dictionaries.{kind}")


def config_class(kind: str) -> type[DictionaryConfig]:
    """The Config class of an architecture; ValueError for an unknown kind."""
    return _module(kind).Config


def build(config: DictionaryConfig, dims: ModelDims) -> Dictionary:
    """An unstarted dictionary of the config's architecture."""
    return _module(config.kind).Module(config, dims)


def load_dictionary(path: Path | str) -> Dictionary:
    """Load a dictionary of any architecture from the directory of its run; ValueError when it is damaged."""
    config = read_description(path)["config"]
    kind = config.get("kind") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{Path(path) / 'dictionary.json'} names the architecture {kind!r}, this version has "
                         f"{', '.join(KINDS)}; train the run again")  # fmt: skip
    return _module(kind).Module.load(path)
