"""Write what must agree with something else: ``make sync``.

dvc.yaml's code dependencies equal what the stages import; every profile's dvc.yaml is a copy of the root's; the
evidence and gpu parameters are the laptop's at other sizes.

DVC does not follow imports, so every stage lists its import closure. Architectures are the one exception: the registry
imports them by name, and a training depends on the file of its own architecture only.
"""

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import grimp
import yaml

from crosshead.dictionaries.registry import KINDS
from crosshead.io.files import write_text
from crosshead.io.settings import read_sections

__all__ = ["PROFILES", "ROOT", "code_closure", "derived_parameters", "stage_names", "write_dependencies"]

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ("smoke", "evidence", "gpu")
_REGISTRY = "crosshead.dictionaries.registry"
_TEMPLATES = "src/crosshead/reporting/templates"
_ARCHITECTURES = {f"crosshead.dictionaries.{kind}" for kind in KINDS}

Sections = dict[str, Any]


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


def derived_parameters(profile: str) -> str:
    """The evidence or gpu parameter file, from the laptop's."""
    sections = read_sections(ROOT / "params.yaml")
    home = f"flows/profiles/{profile}"
    sections["profile"] = profile
    sections["paths"] = {
        "root": "../../..",
        "params": f"{home}/params.yaml",
        "data": f"data/{profile}",
        "reports": f"reports/{profile}",
        "inputs": f"{home}/inputs",
    }
    if (path := ROOT / "flows" / "profiles" / profile / "params.yaml").exists():
        # Prices are measured on the machine a profile is for (`make calibrate PROFILE=...`), so each keeps its own.
        own = read_sections(path).get("training", {}).get("engine", {})
        sections["training"]["engine"] |= {"costs": own["costs"]} if "costs" in own else {}
    note = {"evidence": _evidence, "gpu": _gpu}[profile](sections)
    lines = [f"# {note}", "# Written by `make sync` from the root's params.yaml; change flows/sync.py instead."]
    for name, section in sections.items():
        entries = section.items() if isinstance(section, dict) and section else ()
        lines += [f"{name}:", *(f"  {key}: {_inline(value)}" for key, value in entries)] if entries else [
            f"{name}: {_inline(section)}"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def _evidence(sections: Sections) -> str:
    sections["corpus"] |= {"train_contexts": 2048, "heldout_contexts": 128}
    sections["harvest"]["sites"].append({"layer": "adjacent", "names": ["v"]})
    sections["training"] |= {"steps": 1200, "checkpoint_every": 100}
    for defaults in sections["dictionaries"].values():
        defaults["training"] = {"steps": 1200}
    sections["evaluation"] |= {"splice_contexts": 16}
    sections["clusters"]["runs"] = ["mtc-k60-s0", "value-both-k64-s0"]
    runs: Sections = {}
    for seed in (0, 1, 2):
        for series, own in _MTC_SERIES.items():
            for k in (20, 40, 60, 90, 130, 200) if series in ("mtc", "top1") else (60, 130):
                runs[f"{series}-k{k}-s{seed}"] = _run("mtc", series, "superposition", ["first"], k, seed, own)
        for series, (layers, own) in _VALUE_SERIES.items():
            for k in (8 * len(layers), 16 * len(layers), 32 * len(layers), 64 * len(layers)):
                runs[f"{series}-k{k}-s{seed}"] = _run("value_sae", series, "value-layers", layers, k, seed, own)
        for k in (15, 30, 60, 110):
            run = _run("attn_out_sae", "attn-out-sae", "attention-output", ["first"], k, seed)
            runs[f"attn-out-k{k}-s{seed}"] = run
    sections["runs"] = runs
    return "The evidence profile: more sparsities, seeds, controls; hours on two cores, as many sittings as you like."


_MTC_SERIES: dict[str, Sections] = {
    "mtc": {},
    "top1": {"heads_per_feature": 1},
    "top1-fixed": {"heads_per_feature": 1, "assignment": "fixed"},
    "heads2": {"heads_per_feature": 2},
    "heads4": {"heads_per_feature": 4},
    "mtc-resid": {"target": "resid_out"},
    "mtc-nonnegative": {"loadings_sign": "nonnegative"},
    "mtc-penalty-l1": {"loadings_penalty": "l1"},
    "mtc-penalty-l2": {"loadings_penalty": "l2"},
}
_VALUE_SERIES: dict[str, tuple[list[str], Sections]] = {
    "value-first": (["first"], {}),
    "value-second": (["second"], {}),
    "value-adjacent": (["adjacent"], {}),
    "value-both": (["first", "second"], {"features": 2048}),
    "value-both-equal": (["first", "second"], {}),
    "value-both-control": (["first", "second"], {"features": 2048, "control": "other_contexts"}),
    "value-near": (["first", "adjacent"], {"features": 2048}),
    "value-near-control": (["first", "adjacent"], {"features": 2048, "control": "other_contexts"}),
}


def _run(
    kind: str, series: str, family: str, layers: list[str], k: int, seed: int, own: Sections | None = None
) -> Sections:
    sparsity = {"kind": "batch_topk", "k": k}
    return {"kind": kind, "series": series, "family": family, "layers": list(layers), "seed": seed,
            "sparsity": sparsity, **copy.deepcopy(own or {})}  # fmt: skip


def _gpu(sections: Sections) -> str:
    sections["machine"] = {"device": "cuda", "threads": 8}
    sections["corpus"] |= {"train_contexts": 8192, "heldout_contexts": 256, "contexts_per_document": 256}
    sections["harvest"] |= {"batch_contexts": 64, "shard_contexts": 256}
    sections["training"] |= {
        "steps": 8000, "contexts_per_batch": 16, "warmup_steps": 400, "learning_rate": 1e-3, "autocast": "bf16",
        "evaluate_every": 1000, "checkpoint_every": 1000, "start_contexts": 64, "calibrate_contexts": 128,
    }  # fmt: skip
    sections["training"]["engine"] |= {"tile_mib": 256.0, "shares_mib": 1024.0}
    sections["dictionaries"]["mtc"]["features"] = 100_000
    for defaults in sections["dictionaries"].values():
        defaults.pop("training", None)
    for run in sections["runs"].values():
        run.pop("training", None)
    sections["evaluation"] |= {"splice_contexts": 64}
    return (
        "The gpu profile: 100,000 features per MTC, 33 million tokens (16 passes; a hub corpus has more), bf16.\n"
        "# The prices in training.engine.costs are a CPU's until `make calibrate PROFILE=gpu` has run on the GPU."
    )


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
