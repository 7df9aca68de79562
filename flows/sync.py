"""Write what must agree with something else: ``make sync``.

dvc.yaml's code dependencies equal what the stages import; every profile's dvc.yaml is a copy of the root's; the
evidence and gpu parameters are the laptop's at other sizes. Of runs that a profile no longer has, neither lock entries,
which DVC keeps for ever, nor reports are left.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from crosshead.io.files import write_text
from crosshead.io.settings import read_sections
from flows._closure import ROOT, code_closure, import_graph
from flows._profiles import derived_parameters

__all__ = ["PROFILES", "living_stages", "remove_leftovers", "stage_names", "without_dead", "write_dependencies"]

PROFILES = ("smoke", "evidence", "gpu")


def stage_names() -> list[str]:
    """Names of the stages, as dvc.yaml has them."""
    return list(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])


def write_dependencies(text: str) -> str:
    """dvc.yaml with every stage's block of code dependencies rewritten."""
    graph = import_graph()
    for stage in stage_names():
        if not (closure := code_closure(stage, graph)):
            continue
        section = re.search(rf"^  {stage}:\n(?:(?:    .*)?\n)*", text, re.MULTILINE)
        assert section is not None, stage
        block = re.search(r"(?:^ +- (?:src|flows)/.*\n)+", section[0], re.MULTILINE)
        assert block is not None, f"stage {stage} lists no code"
        indent = block[0][: block[0].index("-")]
        lines = "".join(f"{indent}- {path}\n" for path in closure)
        text = text.replace(section[0], section[0].replace(block[0], lines))
    return text


def living_stages(stages: Mapping[str, Any], sections: Mapping[str, Any]) -> set[str]:
    """Names as in dvc.lock: ``stage@run`` where dvc.yaml repeats a stage over a section of the parameters."""
    names: set[str] = set()
    for name, stage in stages.items():
        if "foreach" not in stage:
            names.add(name)
            continue
        repeated: Any = sections
        for part in stage["foreach"].removeprefix("${").removesuffix("}").split("."):
            repeated = repeated[part]
        names |= {f"{name}@{item}" for item in repeated}
    return names


def without_dead(lock: str, living: set[str]) -> str:
    """dvc.lock without the entries of stages that are gone, else letter by letter."""
    head, *entries = re.split(r"^(?=  \S)", lock, flags=re.MULTILINE)
    return head + "".join(entry for entry in entries if entry.partition(":")[0].strip() in living)


def remove_leftovers(home: Path, root: Path = ROOT) -> None:
    """Drop what runs that are gone left in the lock of ``home`` and among its reports, which lie under ``root``."""
    sections = read_sections(home / "params.yaml")
    lock = home / "dvc.lock"
    if lock.exists():
        stages = yaml.safe_load((home / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        text = lock.read_text(encoding="utf-8")
        if (kept := without_dead(text, living_stages(stages, sections))) != text:
            write_text(lock, kept)
    runs = {*sections["runs"], *sections["attention_runs"]}
    for folder in ("runs", "attention", "summaries"):
        for report in (root / sections["paths"]["reports"] / folder).glob("*.json"):
            if report.stem not in runs:
                report.unlink()


def _main() -> None:
    pipeline = ROOT / "dvc.yaml"
    write_text(pipeline, write_dependencies(pipeline.read_text(encoding="utf-8")))
    for profile in PROFILES:
        home = ROOT / "flows" / "profiles" / profile
        shutil.copyfile(pipeline, home / "dvc.yaml")
        if profile != "smoke":
            write_text(home / "params.yaml", derived_parameters(profile))
    for home in (ROOT, *(ROOT / "flows" / "profiles" / profile for profile in PROFILES)):
        remove_leftovers(home)


if __name__ == "__main__":
    _main()
