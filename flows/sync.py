"""Write what must agree with something else: ``make sync``.

dvc.yaml's code dependencies equal what the stages import; every profile's dvc.yaml is a copy of the root's; the
evidence and gpu parameters are the laptop's at other sizes.
"""

import re
import shutil

import yaml

from crosshead.io.files import write_text
from flows._closure import ROOT, code_closure, import_graph
from flows._profiles import derived_parameters

__all__ = ["PROFILES", "stage_names", "write_dependencies"]

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
