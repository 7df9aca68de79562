"""Attention features of real language models: multitoken transcoders, value SAEs and their controls.

``load_dictionary`` reads a trained run, ``load_model`` a base model in hub layout, ``read_texts`` turns texts into a
batch of activations. Names are imported when they are first used, so that ``import crosshead`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosshead.activations.base_model import LanguageModel, load_model
    from crosshead.activations.capture import capture
    from crosshead.activations.texts import read_texts
    from crosshead.dictionaries.base import Batch, Dictionary, Site
    from crosshead.dictionaries.registry import load_dictionary

__all__ = ["Batch", "Dictionary", "LanguageModel", "Site", "capture", "load_dictionary", "load_model", "read_texts"]

_HOMES = {
    "Batch": "dictionaries.base",
    "Dictionary": "dictionaries.base",
    "LanguageModel": "activations.base_model",
    "Site": "dictionaries.base",
    "capture": "activations.capture",
    "load_dictionary": "dictionaries.registry",
    "load_model": "activations.base_model",
    "read_texts": "activations.texts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'crosshead' has no attribute {name!r}")
    return getattr(import_module(f"crosshead.{_HOMES[name]}"), name)
