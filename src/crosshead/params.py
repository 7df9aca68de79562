"""A whole parameter file: the configs that live beside their consumers, put together.

A stage validates its own sections only, so that its code dependencies stay its own; ``load_params`` validates all of
them, and against one another, before anything runs. ``python -m crosshead.params FILE...`` says what is wrong and exits
with 2.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict

from crosshead.activations.base_model import ModelConfig
from crosshead.activations.controls import sites_read
from crosshead.activations.corpus import CorpusConfig
from crosshead.activations.harvest import HarvestConfig
from crosshead.activations.machine import Machine
from crosshead.activations.sites import stored_sites
from crosshead.activations.survey import LayerChoice, SurveyConfig
from crosshead.analysis.clustering import ClusterConfig
from crosshead.analysis.evaluation import EvaluationConfig
from crosshead.analysis.explaining import ExplainConfig
from crosshead.analysis.findings import ReportConfig
from crosshead.analysis.meaning import MeaningConfig
from crosshead.analysis.one_head import NullConfig
from crosshead.analysis.planted_suite import PlantedSuiteConfig
from crosshead.analysis.references import ReferenceConfig
from crosshead.analysis.replacement_study import ReplacementsConfig
from crosshead.attention.registry import build as build_attention_model
from crosshead.dictionaries.base import ModelDims
from crosshead.dictionaries.registry import build
from crosshead.io.settings import nearest, parse_section, read_sections
from crosshead.training.attention_runs import ATTENTION
from crosshead.training.fit import TrainingConfig
from crosshead.training.runs import DICTIONARIES, UNCHOSEN_LAYERS, Registry, Run, read_defaults, read_run

__all__ = ["Params", "Paths", "Profile", "load_params"]

Profile = Literal["laptop", "smoke", "evidence", "gpu"]


class Paths(BaseModel):
    """Where a profile's files lie, seen from the repository root."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: str
    """The repository root, seen from the profile's dvc.yaml."""
    params: str
    """The profile's parameter file."""
    data: str
    """Directory of stage outputs."""
    reports: str
    """Directory of reports and metrics."""
    inputs: str
    """Directory of finished results of other profiles that the report shows as labelled inputs."""


@dataclass(frozen=True)
class Params:
    """A validated profile."""

    profile: Profile
    paths: Paths
    machine: Machine
    model: ModelConfig
    corpus: CorpusConfig
    survey: SurveyConfig
    harvest: HarvestConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    attention_evaluation: EvaluationConfig
    references: ReferenceConfig
    clusters: ClusterConfig
    nulls: NullConfig
    planted: PlantedSuiteConfig
    meaning: MeaningConfig
    explain: ExplainConfig
    replacements: ReplacementsConfig
    report: ReportConfig
    runs: dict[str, Run]
    attention_runs: dict[str, Run]


_CONFIGS: dict[str, type[BaseModel]] = {
    "paths": Paths,
    "machine": Machine,
    "model": ModelConfig,
    "corpus": CorpusConfig,
    "survey": SurveyConfig,
    "harvest": HarvestConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
    "attention_evaluation": EvaluationConfig,
    "references": ReferenceConfig,
    "clusters": ClusterConfig,
    "nulls": NullConfig,
    "planted": PlantedSuiteConfig,
    "meaning": MeaningConfig,
    "explain": ExplainConfig,
    "replacements": ReplacementsConfig,
    "report": ReportConfig,
}
_SHOWN = 10
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_REGISTRIES = (DICTIONARIES, ATTENTION)
_SECTIONS = ("profile", *_CONFIGS, *(name for registry in _REGISTRIES for name in (registry.defaults, registry.runs)))
# The model is not known yet: no dictionary lies too deep or has too many heads for this one.
_ANY_MODEL = ModelDims(d_model=1, n_heads=4096, n_kv_heads=4096, head_dim=1, n_layers=2_000_000)


def load_params(path: Path | str) -> Params:
    """Read and validate a parameter file. ValueError with one line for every fault."""
    sections = read_sections(path)
    faults = [f"{path}: {name} is not a section; {nearest(str(name), _SECTIONS)}"
              for name in sections if name not in _SECTIONS]  # fmt: skip
    faults += [f"{path}: {name} is missing; add it" for name in _SECTIONS if name not in sections]
    if "profile" in sections and sections["profile"] not in get_args(Profile):
        known = nearest(str(sections["profile"]), get_args(Profile))
        faults.append(f"{path}: profile = {sections['profile']!r} is not a profile; {known}")
    found: dict[str, Any] = {}
    for name, config in _CONFIGS.items():
        if name in sections:
            with _collecting(faults):
                section = sections[name]
                found[name] = parse_section(config, {} if section is None else section, name, path)
    for registry in _REGISTRIES:
        with _collecting(faults):
            found[registry.runs] = _read_runs(registry, sections, path, faults)
    faults += _at_odds(sections, found, path)
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    return Params(profile=sections["profile"], **found)


class _collecting:  # noqa: N801 - reads as a statement
    """Put the lines of a ValueError among the faults and go on."""

    def __init__(self, faults: list[str]):
        self.faults = faults

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, ValueError):
            self.faults.extend(str(error).splitlines())
            return True
        return False


def _read_runs(registry: Registry, sections: Mapping[str, Any], path: Path | str, faults: list[str]) -> dict[str, Run]:
    defaults, entries = sections.get(registry.defaults) or {}, sections.get(registry.runs) or {}
    if not isinstance(defaults, dict) or not isinstance(entries, dict):
        raise ValueError(f"{path}: {registry.defaults} and {registry.runs} are mappings from names to parameters; "
                         "correct them")  # fmt: skip
    training = sections.get("training") or {}
    for kind, own in defaults.items():
        with _collecting(faults):
            if kind not in registry.kinds:
                raise ValueError(f"{path}: {registry.defaults}.{kind} is not an architecture; "
                                 f"{nearest(str(kind), registry.kinds)}")  # fmt: skip
            read_defaults(kind, own or {}, training, path, registry)
    runs = {}
    for name, entry in entries.items():
        with _collecting(faults):
            if not isinstance(name, str):
                raise ValueError(f"{path}: {registry.runs}.{name} has no name but a {type(name).__name__}; "
                                 "put it in quotes")  # fmt: skip
            if not _NAME.fullmatch(name):
                raise ValueError(f"{path}: {registry.runs}.{name}: files and DVC stages take the name of a run, and it "
                                 "has other characters than letters, digits, - and _; rename it")  # fmt: skip
            kind = entry.get("kind") if isinstance(entry, dict) else None
            own = defaults.get(kind) if isinstance(kind, str) else None
            runs[name] = read_run(name, entry, own or {}, training, path, registry)
    return runs


def _at_odds(sections: Mapping[str, Any], found: Mapping[str, Any], path: Path | str) -> list[str]:
    """Sections that are right in themselves and do not fit one another."""
    names = {registry.runs: [str(name) for name in sections[registry.runs]] for registry in _REGISTRIES
             if isinstance(sections.get(registry.runs), dict)}  # fmt: skip
    faults = [f"{path}: attention_runs.{name} is the name of another run under runs; give it one of its own"
              for name in names.get("attention_runs", ()) if name in names.get("runs", ())]  # fmt: skip
    for key, named, where in _named_runs(found):
        known = [name for section in where for name in names.get(section, ())]
        if all(section in names for section in where):
            faults += [f"{path}: {key} names {name!r}, which is not under {' or '.join(where)}; {nearest(name, known)}"
                       for name in named if name not in known]  # fmt: skip
    faults += _of_another_kind(found, path)
    if {"survey", "harvest", "runs", "attention_runs"} <= found.keys():
        for run in (*found["runs"].values(), *found["attention_runs"].values()):
            with _collecting(faults):
                faults += _not_harvested(run, found["harvest"], found["survey"], path)
    return faults


def _named_runs(found: Mapping[str, Any]) -> list[tuple[str, Sequence[str], tuple[str, ...]]]:
    """Where a section names runs, which, and the sections that they are looked up in."""
    named: list[tuple[str, Sequence[str], tuple[str, ...]]]
    named = [(f"{key}.runs", found[key].runs, ("runs",)) for key in ("clusters", "nulls", "meaning") if key in found]
    named += [("meaning.settings", found["meaning"].settings, ("runs",))] if "meaning" in found else []
    if "nulls" in found:
        named.append(("nulls.teacher", (found["nulls"].teacher,), ("runs",)))
    if "explain" in found:
        named.append(("explain.runs", found["explain"].runs, ("attention_runs",)))
    if "replacements" in found:
        named.append(("replacements.heads_of", found["replacements"].heads_of, ("attention_runs",)))
        named.append(("replacements.codes_of", found["replacements"].codes_of, ("attention_runs", "runs")))
    return named


def _of_another_kind(found: Mapping[str, Any], path: Path | str) -> list[str]:
    """Runs of a kind that a stage is not made for."""
    faults: list[str] = []
    for section, key, kind, where in (
        ("nulls", "runs", "mtc", "runs"), ("nulls", "teacher", "mtc", "runs"),
        ("explain", "runs", "qk_diagonal", "attention_runs"),
        ("replacements", "heads_of", "replacement", "attention_runs"),
    ):  # fmt: skip
        named, runs = getattr(found[section], key) if section in found else (), found.get(where, {})
        named = (named,) if isinstance(named, str) else named
        faults += [f"{path}: {section}.{key} names {name!r}, a {runs[name].kind}; name runs of {kind} only"
                   for name in named if name in runs and runs[name].kind != kind]  # fmt: skip
    if "meaning" in found and set(found["meaning"].runs) <= found.get("runs", {}).keys():
        meaning = found["meaning"]
        faults += [f"{path}: meaning.matched names {name!r}, which is not under meaning.runs; add it there"
                   for pair in meaning.matched for name in pair if name not in meaning.runs]  # fmt: skip
    if "explain" in found:
        explain = found["explain"]
        faults += [f"{path}: explain.decisions names {decision.run!r}, which is not under explain.runs; add it there"
                   for decision in explain.decisions if decision.run not in (None, *explain.runs)]  # fmt: skip
    return faults


def _not_harvested(run: Run, harvest: HarvestConfig, survey: SurveyConfig, path: Path | str) -> list[str]:
    """Which sites a run reads that the harvest does not keep. The architecture itself says what it reads."""
    layers = survey.layers.model_dump() if isinstance(survey.layers, LayerChoice) else UNCHOSEN_LAYERS
    builder = build if run.registry.runs == DICTIONARIES.runs else build_attention_model
    with torch.device("meta"):  # shapes without memory
        module = builder(run.dictionary_config(layers), _ANY_MODEL)
    harvested = harvest.resolve(layers)
    lowest = min(site.layer for site in harvested)
    needed = stored_sites(sites_read((*module.sites, *module.start_sites), run.control, lowest))
    absent = sorted(set(needed) - set(harvested))
    as_written = {layers[layer]: layer for layer in run.dictionary["layers"] if isinstance(layer, str)}
    by_layer: dict[str | int, list[str]] = {}
    for site in absent:
        by_layer.setdefault(as_written.get(site.layer, site.layer), []).append(site.name)
    key = f"{run.registry.runs}.{run.name}.layers"
    return [f"{path}: {key}: harvest.sites lacks {', '.join(names)} of layer {layer}; add "
            f"{{layer: {layer}, names: [{', '.join(names)}]}} to it" for layer, names in by_layer.items()]  # fmt: skip


def _main(paths: Sequence[str]) -> int:
    status = 0
    for path in paths:
        try:
            load_params(path)
        except ValueError as error:
            lines = str(error).splitlines()
            print("\n".join(lines[:_SHOWN]), file=sys.stderr)
            if len(lines) > _SHOWN:
                print(f"{path}: and {len(lines) - _SHOWN} more", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
