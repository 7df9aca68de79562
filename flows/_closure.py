"""Which files a stage runs: the closure of its imports.

DVC does not follow imports, so every stage lists these files. Architectures are the one exception: the registries
import them by name, and a training runs the file of its own architecture only.
"""

from pathlib import Path

import grimp

from crosshead.analysis.attention_metrics import HOMES
from crosshead.attention.registry import KINDS as ATTENTION_KINDS
from crosshead.dictionaries.registry import KINDS

__all__ = ["ROOT", "TRAININGS", "code_closure", "import_graph", "training_closure"]

ROOT = Path(__file__).resolve().parents[1]

_TEMPLATES = "src/crosshead/reporting/templates"
_IMPORTED_BY_NAME = {
    "crosshead.dictionaries.registry": {kind: {f"crosshead.dictionaries.{kind}"} for kind in KINDS},
    "crosshead.attention.registry": {kind: {f"crosshead.attention.{kind}"} for kind in ATTENTION_KINDS},
    "crosshead.analysis.attention_metrics": {kind: {f"crosshead.analysis.{HOMES[kind]}"} for kind in ATTENTION_KINDS},
}
TRAININGS: dict[str, str] = {
    **dict.fromkeys(KINDS, "train"), **dict.fromkeys(ATTENTION_KINDS, "attention"), "nulls": "nulls",
}  # fmt: skip
"""The stage that trains each architecture; ``nulls`` trains MTCs once more."""


def import_graph() -> grimp.ImportGraph:
    """Who imports whom, functions' own imports included, imports for type checkers not."""
    return grimp.build_graph("crosshead", "flows", exclude_type_checking_imports=True, cache_dir=None)


def code_closure(stage: str, graph: grimp.ImportGraph | None = None) -> list[str]:
    """The files a stage imports, packages included, as dvc.yaml should list them.

    None for stages that train: they depend on a list that ``code`` writes, and ``code`` on all that any training runs.
    """
    graph = graph or import_graph()
    if stage in TRAININGS.values():
        return []
    stages = {stage, *TRAININGS.values()} if stage == "code" else {stage}
    found = _closure(graph, {f"flows.{name}" for name in stages})
    by_name = [modules for importer, kinds in _IMPORTED_BY_NAME.items() if importer in found
               for modules in kinds.values()]  # fmt: skip
    found |= _closure(graph, set().union(*by_name))
    beside = {_TEMPLATES} if "crosshead.reporting.render" in found else set()
    return sorted({_path(module) for module in found} | beside)


def training_closure(kind: str, graph: grimp.ImportGraph) -> list[str]:
    """The files that a training of one architecture imports."""
    by_name = "mtc" if kind == "nulls" else kind
    own = set().union(*(kinds.get(by_name, set()) for kinds in _IMPORTED_BY_NAME.values()))
    return sorted(_path(module) for module in _closure(graph, {f"flows.{TRAININGS[kind]}"} | own))


def _closure(graph: grimp.ImportGraph, modules: set[str]) -> set[str]:
    found: set[str] = set()
    pending = set(modules)
    while pending:
        module = pending.pop()
        found.add(module)
        imported = graph.find_modules_directly_imported_by(module)
        if "." in module:
            imported = imported | {module.rpartition(".")[0]}
        pending |= imported - found
    return found


def _path(module: str) -> str:
    path = Path("src" if module.startswith("crosshead") else ".", *module.split("."))
    package = ROOT / path / "__init__.py"
    return (path / "__init__.py" if package.exists() else path.with_suffix(".py")).as_posix()
