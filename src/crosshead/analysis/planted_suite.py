"""The questions that the instruments are asked where the answer is known, before they are asked about a real model.

    recovery        does an MTC find the planted features, and does a Top-1 MTC find them where each has one head?
    superposition   is a layer called superposed exactly when it is, in the presence of noise?
    shared_layers   does a two-layer value SAE gain exactly where layers share features?
    toys            are trained transformers that must spread work over heads called superposed?
    phases          what share of features is recovered over mixing, noise and density?

A layer is called superposed when the MTC's error over a Top-1 MTC's, at equal k, lies below the same ratio on the
one-head null (``one_head``) by a margin. Below 1 it can lie on one-head layers too, where the Top-1 MTC settles on
wrong heads. Design choices; the controls after methods for planted truth in the January 2024 update.
"""

import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crosshead.activations.batches import Control
from crosshead.activations.planted import PlantedConfig
from crosshead.activations.toys import ToyConfig, ToyKind
from crosshead.analysis.planted_trials import layer_trial, phase_trial, shared_trial, toy_trial
from crosshead.io.files import fingerprint, read_json, write_json
from crosshead.training.fit import TrainingConfig

__all__ = ["PlantedSuiteConfig", "run_suite"]

Question = Literal["recovery", "superposition", "shared_layers", "toys", "phases"]
Count = Annotated[int, Field(gt=0)]
_MIXING = {"one-head": 0.0, "superposed": 1.0}
_SHARED: dict[str, tuple[float, Control]] = {
    "shared": (1.0, "none"), "separate": (0.0, "none"), "other_contexts": (1.0, "other_contexts"),
}  # fmt: skip


def _schedule(**changes: Any) -> TrainingConfig:
    usual = {"contexts_per_batch": 16, "evaluate_every": 1_000, "checkpoint_every": 1_000, "start_contexts": 256}
    return TrainingConfig.model_validate(usual | changes)


def _moving_schedule(steps: int) -> TrainingConfig:
    """Of MTCs. At the full rate a batch with an unusual gradient can throw the head loading of a feature that had been
    found below the competition for good, so that the Top-1 MTC ends without it: the rate falls from early on.
    """
    return _schedule(steps=steps, learning_rate=8e-3, decay_fraction=0.6)


class SharedLayers(BaseModel):
    """Planted pairs of layers and the value SAEs on them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: PlantedConfig = PlantedConfig(
        layers=2, d_model=24, heads=("previous_token", "induction"), families=2, features=96, l0=6.0, mixing=1.0,
        noise=0.3, sites=("v",),
    )  # fmt: skip
    """The pair; seed and share of common features are set by the suite. Narrow values, noisy ones: one layer alone
    shows its features badly, so that a second look at them is worth something."""
    features: Count = 128
    """Of a one-layer SAE; the two-layer one has twice as many."""
    coefficient: Annotated[float, Field(gt=0)] = 1.0
    """Of the L1 penalty."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Layers are said to share features where the objective falls by more than this share."""
    training: TrainingConfig = _schedule(steps=1_500, learning_rate=3e-3)
    """Of every value SAE."""


class Toys(BaseModel):
    """Small transformers and the dictionaries on them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: Count | None = None
    """How many of the suite's seeds, from the first on; None means all."""
    kinds: tuple[ToyKind, ...] = get_args(ToyKind)
    """Which ones."""
    toy: ToyConfig = ToyConfig()
    """Their size and training."""
    features: Count = 48
    """Of the dictionaries."""
    k: Count = 1
    """Active features per position."""
    starts: Count = 4
    """Trainings of every dictionary, from other starts; the one of least held-out error counts. With one active feature
    at a time errors differ by a third between starts, more than an MTC's lead over a Top-1 MTC."""
    training: TrainingConfig = _moving_schedule(1_500)
    """Of the dictionaries."""


class Phases(BaseModel):
    """A grid of planted layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: Count = 1
    """How many of the suite's seeds, from the first on."""
    mixing: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 0.3, 1.0)
    """From one head to all."""
    noise: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 0.3)
    """Relative level."""
    l0: tuple[Annotated[float, Field(gt=0)], ...] = (2.0, 6.0)
    """Active features per position."""
    training: TrainingConfig = _moving_schedule(1_500)
    """Of every MTC."""


class PlantedSuiteConfig(BaseModel):
    """What is asked, of what, how often."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """Of planting and training alike."""
    commit_seed: bool = False
    """One more seed, from the current commit: no choice of parameters can have been made with it in view."""
    questions: Annotated[tuple[Question, ...], Field(min_length=1)] = ("recovery", "superposition")
    """Which questions."""
    layer: PlantedConfig = PlantedConfig(train_contexts=4096)
    """The layer of recovery, superposition and phases; seed and mixing are set by the suite. From half as many contexts
    the encoders of the rarest features, which fire at 4% of positions, fit the noise of their few firings."""
    features_per_true: Count = 3
    """Features of a dictionary for each planted one: some starts end in the same place."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """A layer is superposed where its ratio lies below the null's by more than this share. On layers with one head per
    feature it can lie below as well: the null is made of what Top-1 has found, the layer also of what it has not."""
    training: TrainingConfig = _moving_schedule(4_000)
    """Of recovery's and superposition's dictionaries."""
    shared_layers: SharedLayers = SharedLayers()
    """Of the question of that name, like the next two."""
    toys: Toys = Toys()
    phases: Phases = Phases()

    @model_validator(mode="after")
    def _each_once(self) -> "PlantedSuiteConfig":
        for name in ("seeds", "questions"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"got {name} {list(given)}; give each once")
        n_seeds = len(self.seeds) + self.commit_seed
        for name, wanted in (("toys", self.toys.seeds), ("phases", self.phases.seeds)):
            if wanted is not None and wanted > n_seeds:
                raise ValueError(f"got {name}.seeds={wanted} of {n_seeds} seeds; lower it")
        return self

    @property
    def n_features(self) -> int:
        """Features of recovery's dictionaries."""
        dimensions = [self.layer.ov_dimensions[i % self.layer.families % len(self.layer.ov_dimensions)]
                      for i in range(self.layer.features)]  # fmt: skip
        return self.features_per_true * sum(dimensions)


class _Trial(NamedTuple):
    name: str
    """Of its file and folder."""
    run: Callable[[Path], Any]
    """Its figures, worked out in a directory."""


def run_suite(config: PlantedSuiteConfig, work: Path, commit: str | None = None) -> dict[str, Any]:
    """Ask all questions: ``{rows, seeds, commit_seed}``. ``commit`` names the current commit, for ``commit_seed``.

    Finished trials are kept as ``work/<trial>.json`` and not run again; an unfinished one goes on in its folder. So a
    ``work`` belongs to one config.
    ValueError where ``commit_seed`` is asked for and there is no commit.
    """
    derived = _commit_seed(commit) if config.commit_seed else None
    seeds = [*config.seeds, *([] if derived is None or derived in config.seeds else [derived])]
    rows = [row for seed in seeds for row in _rows_of_seed(config, seed, work)]
    if "toys" in config.questions:
        rows += [
            _toy_row(config, kind, seed, work) for seed in seeds[: config.toys.seeds] for kind in config.toys.kinds
        ]
    if "phases" in config.questions:
        rows += [row for seed in seeds[: config.phases.seeds] for row in _phases(config, seed, work)]
    return {"rows": rows, "seeds": seeds, "commit_seed": derived}


def _commit_seed(commit: str | None) -> int:
    if not commit:
        raise ValueError("planted.commit_seed needs a git commit; run in a repository with one, or set it to false")
    return int(fingerprint({"commit": commit}), 16) % 2**31


def _finished(trial: _Trial, work: Path) -> Any:
    """The figures of a trial, run now unless they are there. Its folder goes once they are."""
    result = work / f"{trial.name}.json"
    if not result.exists():
        directory = work / trial.name
        directory.mkdir(parents=True, exist_ok=True)
        write_json(result, trial.run(directory))
        shutil.rmtree(directory)
    return read_json(result)


def _rows_of_seed(config: PlantedSuiteConfig, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    questions = config.questions
    if "recovery" in questions or "superposition" in questions:
        for name, mixing in _MIXING.items():
            yield from _layer_rows(config, name, mixing, seed, work)
    if "shared_layers" in questions:
        for case in _SHARED:
            yield _shared_row(config, case, seed, work)


def _layer_rows(
    config: PlantedSuiteConfig, name: str, mixing: float, seed: int, work: Path
) -> Iterator[dict[str, Any]]:
    layer = config.layer.model_copy(update={"seed": seed, "mixing": mixing, "layers": 1})
    with_null = "superposition" in config.questions
    trial = f"layer-{name}-{seed}{'-null' * with_null}"
    found = _finished(_Trial(trial, lambda directory: layer_trial(
        layer, config.training, config.n_features, seed, directory, with_null=with_null)), work)  # fmt: skip
    same = {"layer": name, "seed": seed}
    if "recovery" in config.questions:
        yield from ({"question": "recovery", **same, **row} for row in found["rows"])
    if with_null:
        yield {"question": "superposition", **same, **_verdict(found, config.margin), "noise": layer.noise}


def _verdict(found: dict[str, Any], margin: float) -> dict[str, Any]:
    ratio, null = found["ratio"], found["null_ratio"]
    return {"ratio": ratio, "null_ratio": null, "margin": margin, "superposed": ratio < (1 - margin) * null}


def _shared_row(config: PlantedSuiteConfig, case: str, seed: int, work: Path) -> dict[str, Any]:
    own = config.shared_layers
    share, control = _SHARED[case]
    layers = own.layers.model_copy(update={"seed": seed, "shared": share, "layers": 2, "sites": ("v",)})
    found = _finished(_Trial(f"shared-{case}-{seed}", lambda directory: shared_trial(
        layers, own.training, own.features, own.coefficient, control, seed, directory)), work)  # fmt: skip
    verdict = {"margin": own.margin, "found": found["ratio"] < 1 - own.margin}
    return {"question": "shared_layers", "layers": case, "seed": seed, "shared": share, "control": control, **found,
            **verdict, "noise": layers.noise}  # fmt: skip


def _toy_row(config: PlantedSuiteConfig, kind: ToyKind, seed: int, work: Path) -> dict[str, Any]:
    own = config.toys
    found = _finished(_Trial(f"toy-{kind}-{seed}", lambda directory: toy_trial(
        kind, own.toy, own.training, own.features, own.k, seed, directory, own.starts)), work)  # fmt: skip
    return {"question": "toys", "toy": kind, "seed": seed, **found, **_verdict(found, config.margin)}


def _phases(config: PlantedSuiteConfig, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    own = config.phases
    for mixing, noise, l0 in product(own.mixing, own.noise, own.l0):
        cell = {"mixing": mixing, "noise": noise, "planted_l0": l0}
        layer = config.layer.model_copy(
            update={"seed": seed, "mixing": mixing, "noise": noise, "l0": l0, "layers": 1})  # fmt: skip
        name = f"phase-{mixing:g}-{noise:g}-{l0:g}-{seed}"
        found = _finished(_Trial(name, lambda directory, layer=layer: phase_trial(
            layer, own.training, config.n_features, seed, directory)), work)  # fmt: skip
        yield {"question": "phases", "seed": seed, **cell, **found}
