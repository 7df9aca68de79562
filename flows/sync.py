"""Write what must agree with something else: ``make sync``.

dvc.yaml's code dependencies equal what the stages import; every profile's dvc.yaml is a copy of the root's; the
evidence and gpu parameters are the laptop's at other sizes.

DVC does not follow imports, so every stage lists its import closure. Architectures are the one exception: the registry
imports them by name, and a training depends on the file of its own architecture only.
"""

import re
import shutil
from pathlib import Path

import grimp
import yaml

from crosshead.dictionaries.registry import KINDS
from crosshead.io.files import write_text
from flows._profiles import ROOT, derived_parameters

__all__ = ["PROFILES", "ROOT", "code_closure", "derived_parameters", "stage_names", "write_dependencies"]

PROFILES = ("smoke", "evidence", "gpu")
_REGISTRY = "crosshead.dictionaries.registry"
_TEMPLATES = "src/crosshead/reporting/templates"
_ARCHITECTURES = {f"crosshead.dictionaries.{kind}" for kind in KINDS}


def stage_names() -> list[str]:
    """Names of the stages, as dvc.yaml has them."""
    return list(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])


def code_closure(stage: str, graph: grimp.ImportGraph | None = None) -> list[str]:
    """The files a stage imports, packages included, as dvc.yaml should list them."""
    graph = graph or import_graph()
    found = _closure(graph, {f"flows.{stage}"})
    beside = {_TEMPLATES} if "crosshead.reporting.render" in found else set()
    if _REGISTRY not in found:
        return sorted({_path(module) for module in found} | beside)
    found |= _closure(graph, _ARCHITECTURES)
    if stage != "train":
        return sorted(_path(module) for module in found)
    own = "src/crosshead/dictionaries/${item.kind}.py"
    return sorted({_path(module) for module in found - _ARCHITECTURES} | {own})


def import_graph() -> grimp.ImportGraph:
    """Who imports whom, functions' own imports included, imports for type checkers not."""
    return grimp.build_graph("crosshead", "flows", exclude_type_checking_imports=True, cache_dir=None)


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


def write_dependencies(text: str) -> str:
    """dvc.yaml with every stage's block of code dependencies rewritten."""
    graph = import_graph()
    for stage in stage_names():
        section = re.search(rf"^  {stage}:\n(?:(?:    .*)?\n)*", text, re.MULTILINE)
        assert section is not None, stage
        block = re.search(r"(?:^ +- (?:src|flows)/.*\n)+", section[0], re.MULTILINE)
        assert block is not None, f"stage {stage} lists no code"
        indent = block[0][: block[0].index("-")]
        lines = "".join(f"{indent}- {path}\n" for path in code_closure(stage, graph))
        text = text.replace(section[0], section[0].replace(block[0], lines))
    return text


def _main() -> None:
    pipeline = ROOT / "dvc.yaml"
    write_text(pipeline, write_dependencies(pipeline.read_text(encoding="utf-8")))
    for profile in PROFILES:
        home = ROOT / "flows" / "profiles" / profile
        shutil.copyfile(pipeline, home / "dvc.yaml")
        if profile != "smoke":
            write_text(home / "params.yaml", derived_parameters(profile))


if __name__ == "__main__":
    _main()
