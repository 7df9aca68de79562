"""A whole parameter file: the configs that live beside their consumers, put together.

A stage validates its own sections only, so that its code dependencies stay its own; ``load_params`` validates all
of them at once, before anything runs. ``python -m crosshead.params FILE...`` says what is wrong and exits with 2.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from crosshead.activations.base_model import ModelConfig
from crosshead.activations.corpus import CorpusConfig
from crosshead.activations.harvest import HarvestConfig
from crosshead.activations.machine import Machine
from crosshead.activations.survey import SurveyConfig
from crosshead.analysis.clustering import ClusterConfig
from crosshead.analysis.evaluation import EvaluationConfig
from crosshead.analysis.findings import ReportConfig
from crosshead.analysis.references import ReferenceConfig
from crosshead.dictionaries.registry import KINDS
from crosshead.io.settings import nearest, parse_section, read_sections
from crosshead.training.fit import TrainingConfig
from crosshead.training.runs import Run, read_run

__all__ = ["Params", "Paths", "load_params"]


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

    profile: str
    paths: Paths
    machine: Machine
    model: ModelConfig
    corpus: CorpusConfig
    survey: SurveyConfig
    harvest: HarvestConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    references: ReferenceConfig
    clusters: ClusterConfig
    report: ReportConfig
    runs: dict[str, Run]


_CONFIGS: dict[str, type[BaseModel]] = {
    "paths": Paths,
    "machine": Machine,
    "model": ModelConfig,
    "corpus": CorpusConfig,
    "survey": SurveyConfig,
    "harvest": HarvestConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
    "references": ReferenceConfig,
    "clusters": ClusterConfig,
    "report": ReportConfig,
}
_SHOWN = 10
_SECTIONS = ("profile", *_CONFIGS, "dictionaries", "runs")


def load_params(path: Path | str) -> Params:
    """Read and validate a parameter file. ValueError with one line for every fault."""
    sections = read_sections(path)
    faults = [
        f"{path}: {name} is not a section; {nearest(name, _SECTIONS)}" for name in sections if name not in _SECTIONS
    ]
    faults += [f"{path}: {name} is missing; add it" for name in _SECTIONS if name not in sections]
    found: dict[str, Any] = {}
    for name, config in _CONFIGS.items():
        if name in sections:
            with _collecting(faults):
                found[name] = parse_section(config, sections[name] or {}, name, path)
    with _collecting(faults):
        found["runs"] = _read_runs(sections, path, faults)
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    return Params(profile=str(sections["profile"]), **found)


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


def _read_runs(sections: Mapping[str, Any], path: Path | str, faults: list[str]) -> dict[str, Run]:
    defaults, entries = sections.get("dictionaries") or {}, sections.get("runs") or {}
    if not isinstance(defaults, dict) or not isinstance(entries, dict):
        raise ValueError(f"{path}: dictionaries and runs are mappings from names to parameters; correct them")
    for kind in defaults:
        if kind not in KINDS:
            faults.append(f"{path}: dictionaries.{kind} is not an architecture; {nearest(kind, KINDS)}")
    runs = {}
    for name, entry in entries.items():
        with _collecting(faults):
            kind = entry.get("kind") if isinstance(entry, dict) else None
            runs[name] = read_run(name, entry, defaults.get(kind) or {}, sections.get("training") or {}, path)
    return runs


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
