"""A training run as the parameter file describes it: an entry under ``runs:`` over its architecture's defaults."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from crosshead.activations.controls import Control
from crosshead.dictionaries.base import DictionaryConfig
from crosshead.dictionaries.registry import KINDS, config_class
from crosshead.io.settings import nearest, parse_section
from crosshead.training.fit import TrainingConfig

__all__ = ["DICTIONARIES", "UNCHOSEN_LAYERS", "Registry", "Run", "read_defaults", "read_run"]

LAYER_NAMES = ("first", "second", "adjacent")
UNCHOSEN_LAYERS = {"first": 1_000_000, "adjacent": 1_000_001, "second": 1_000_006}
"""Stand-ins until the survey has chosen: numbers that no parameter file writes for a layer of its own."""


class Registry(NamedTuple):
    """Architectures that runs of one section of a parameter file may have."""

    kinds: tuple[str, ...]
    config_class: Callable[[str], type[DictionaryConfig]]
    runs: str
    """The section that holds the runs."""
    defaults: str
    """The section that holds the architectures' parameters."""


DICTIONARIES = Registry(KINDS, config_class, "runs", "dictionaries")


class _Entry(BaseModel):
    """The keys of a run that do not belong to its architecture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """Architecture: the name of its file in crosshead/dictionaries."""
    series: str
    """The frontier this run is a point of."""
    family: str
    """The family of findings it belongs to."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes start, data order and every other random choice."""
    control: Control = "none"
    """What takes the place of the later layers' rows, in training and evaluation: ``other_contexts``, rows of other
    contexts at random positions; ``matched_tokens``, such rows at the same current and previous token;
    ``shared_input``, the values they would have if they read the lowest layer's residual stream."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the ``training`` section."""


class Run(_Entry):
    """A validated run."""

    name: str
    """Its key under ``runs:``."""
    schedule: TrainingConfig
    """The ``training`` section with the overrides of its architecture and its own."""
    dictionary: dict[str, Any]
    """The architecture's parameters; ``layers`` may name the survey's layers."""
    registry: Registry = DICTIONARIES
    """Where its architecture is found."""

    def dictionary_config(self, layers: Mapping[str, int]) -> DictionaryConfig:
        """The architecture's config with layer names replaced by the survey's choice."""
        key = f"{self.registry.runs}.{self.name}"
        return _dictionary_config(self.registry, self.kind, self.dictionary, layers, key, "parameters")


def read_run(
    name: str, entry: Any, defaults: Any, training: Any, source: Path | str, registry: Registry = DICTIONARIES
) -> Run:
    """Validate ``runs.<name>`` over ``dictionaries.<kind>`` and ``training``. ValueError names the key at fault.
    An architecture's defaults may hold a ``training`` of their own, between the general one and the run's.
    """
    key, kinds = f"{registry.runs}.{name}", registry.kinds
    if not isinstance(entry, dict):
        raise ValueError(
            f"{source}: {key} = {entry!r} is not a mapping; give it kind, series, family, layers, sparsity"
        )
    kind = entry.get("kind")
    if kind not in kinds:
        raise ValueError(f"{source}: {key}.kind = {kind!r} is not an architecture; {nearest(str(kind), kinds)}")
    usual, steps = read_defaults(kind, defaults, training, source, registry)
    own = {field: value for field, value in entry.items() if field in _Entry.model_fields}
    dictionary = {**usual, **{field: value for field, value in entry.items() if field not in own}, "kind": kind}
    _dictionary_config(registry, kind, dictionary, UNCHOSEN_LAYERS, key, source)
    general = parse_section(_Entry, own, key, source)
    schedule = parse_section(TrainingConfig, {**steps, **general.training}, f"{key}.training", source)
    return Run(**dict(general), name=name, schedule=schedule, dictionary=dictionary, registry=registry)


def read_defaults(
    kind: str, defaults: Any, training: Any, source: Path | str, registry: Registry = DICTIONARIES
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An architecture's parameters and schedule before a run's own: faults belong to the defaults, not to the run."""
    section = f"{registry.defaults}.{kind}"
    known = [*(field for field in registry.config_class(kind).model_fields if field != "kind"), "training"]
    if not isinstance(defaults, Mapping):
        raise ValueError(f"{source}: {section} = {defaults!r} is not a mapping; give it parameters, e.g. features")
    for field in defaults:
        if field not in known:
            raise ValueError(f"{source}: {section}.{field} is not a parameter; {nearest(str(field), known)}")
    parse_section(TrainingConfig, training, "training", source)
    own = defaults.get("training") or {}
    if not isinstance(own, Mapping):
        raise ValueError(f"{source}: {section}.training = {own!r} is not a mapping; give it parameters, e.g. steps")
    steps = {**training, **own}
    parse_section(TrainingConfig, steps, f"{section}.training", source)
    return {field: value for field, value in defaults.items() if field != "training"}, steps


def _dictionary_config(
    registry: Registry,
    kind: str,
    dictionary: Mapping[str, Any],
    layers: Mapping[str, int],
    key: str,
    source: Path | str,
) -> DictionaryConfig:
    chosen = dictionary.get("layers", ())
    for layer in chosen if isinstance(chosen, list | tuple) else ():
        if isinstance(layer, str) and layer not in layers:
            raise ValueError(
                f"{source}: {key}.layers names {layer!r}, which is no layer; {nearest(layer, LAYER_NAMES)}"
            )
    if isinstance(chosen, list | tuple):
        named = [layer for layer in chosen if isinstance(layer, str)]
        if len(set(named)) < len(named):
            raise ValueError(f"{source}: {key}.layers = {list(chosen)!r} names a layer twice; give each once")
        chosen = [layers.get(layer, layer) if isinstance(layer, str) else layer for layer in chosen]
        # Which of the survey's layers lies lower is known only after it has run: the adjacent one may be either.
        chosen = sorted(chosen) if named and all(isinstance(layer, int) for layer in chosen) else chosen
    config = parse_section(registry.config_class(kind), {**dictionary, "layers": chosen}, key, source)
    k = getattr(getattr(config, "sparsity", None), "k", None)
    if k is not None and k > config.features:
        raise ValueError(f"{source}: {key}.sparsity.k = {k} exceeds features = {config.features}; lower it or raise "
                         "features")  # fmt: skip
    return config
