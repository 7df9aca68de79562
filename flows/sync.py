"""Keep dvc.yaml's code dependencies equal to what the stages import, and the profiles' copies equal to dvc.yaml.

DVC does not follow imports, so every stage lists its import closure. Architectures are the one exception: the registry
imports them by name, and a training depends on the file of its own architecture only (``make sync`` runs this file).
"""

import re
import shutil
from pathlib import Path

import grimp
import yaml

from crosshead.dictionaries.registry import KINDS

__all__ = ["PROFILES", "code_closure", "stage_names"]

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ("smoke", "evidence", "gpu")
_REGISTRY = "crosshead.dictionaries.registry"
_ARCHITECTURES = {f"crosshead.dictionaries.{kind}" for kind in KINDS}


def stage_names() -> list[str]:
    """Names of the stages, as dvc.yaml has them."""
    return list(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])


def code_closure(stage: str, graph: grimp.ImportGraph | None = None) -> list[str]:
    """The files a stage imports, packages included, as dvc.yaml should list them."""
    graph = graph or import_graph()
    found = _closure(graph, {f"flows.{stage}"})
    if _REGISTRY in found:
        found |= _closure(graph, _ARCHITECTURES)
    paths = {_path(module) for module in found - _ARCHITECTURES}
    if _REGISTRY in found and stage == "train":
        paths.add("src/crosshead/dictionaries/${item.kind}.py")
    elif _REGISTRY in found:
        paths |= {_path(module) for module in _ARCHITECTURES}
    return sorted(paths)


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
        indent = re.match(r" +", block[0])
        lines = "".join(f"{indent[0] if indent else ''}- {path}\n" for path in code_closure(stage, graph))
        text = text.replace(section[0], section[0].replace(block[0], lines))
    return text


def _main() -> None:
    pipeline = ROOT / "dvc.yaml"
    pipeline.write_text(write_dependencies(pipeline.read_text(encoding="utf-8")), encoding="utf-8")
    for profile in PROFILES:
        shutil.copyfile(pipeline, ROOT / "flows" / "profiles" / profile / "dvc.yaml")


if __name__ == "__main__":
    _main()
