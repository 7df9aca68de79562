"""Runs of attention models: the section ``attention_runs`` of a parameter file, read as ``runs`` is."""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from crosshead.activations.cache import ActivationSource
from crosshead.dictionaries.base import Trainable
from crosshead.training.attention_runs import ATTENTION
from crosshead.training.runs import Run, read_run
from flows import _runtime
from flows._runtime import Stage

__all__ = ["main", "of_run", "read_attention_run", "take_attention_"]


def read_attention_run(stage: Stage, name: str) -> Run:
    """One validated run. ValueError where the parameter file has no such run, or a wrong one."""
    sections = [stage.sections.get(key) or {} for key in (ATTENTION.runs, ATTENTION.defaults)]
    for key, section in zip((ATTENTION.runs, ATTENTION.defaults), sections, strict=True):
        if not isinstance(section, Mapping):
            raise ValueError(f"{stage.source}: {key} = {section!r} is not a mapping of names to parameters; correct it")
    runs, defaults = sections
    if name not in runs:
        raise ValueError(f"{stage.source}: {ATTENTION.runs}.{name} is missing; add it or name another run")
    kind = runs[name].get("kind") if isinstance(runs[name], dict) else None
    usual = defaults.get(kind) if isinstance(kind, str) else None
    return read_run(name, runs[name], usual or {}, stage.sections.get("training") or {}, stage.source, ATTENTION)


def take_attention_(module: Trainable, cache: ActivationSource) -> None:
    """Hand the layer's attention spec and rotary tables to a model that asks for them."""
    take: Any = getattr(module, "use_attention_", None)
    if take is not None:
        layer = module.config.layers[0]
        take(cache.specs[layer], cache.rotary(layer))


def of_run(stage: Stage, run: str) -> Stage:
    """The stage of one run, named as in dvc.yaml."""
    return replace(stage, name=f"{stage.name}@{run}", run=run)


def main(body: Callable[[Stage], None], *, arguments: list[str] | None = None) -> None:
    """As ``_runtime.main``, with ``--run`` naming an entry of ``attention_runs`` instead of ``runs``."""
    parser = argparse.ArgumentParser(prog=f"python -m flows.{body.__name__}", add_help=False)
    parser.add_argument("--run")
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)

    @functools.wraps(body)
    def with_run(stage: Stage) -> None:
        if options.run is None:
            raise ValueError(f"name a run of {stage.source}: --run <an entry of {ATTENTION.runs}>")
        read_attention_run(stage, options.run)
        body(of_run(stage, options.run))

    _runtime.main(with_run, arguments=rest)
