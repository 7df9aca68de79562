"""Parameters of the evidence and gpu profiles: the laptop's at other sizes, with other runs."""

import copy
from collections.abc import Iterable
from itertools import product
from typing import Any

import yaml

from crosshead.io.settings import read_sections
from flows._attention_profiles import evidence_attention_, gpu_attention_
from flows._closure import ROOT

__all__ = ["derived_parameters"]

Sections = dict[str, Any]


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
    lines = [f"# {note}", "# Written by `make sync` from the root's params.yaml; change flows/_profiles.py instead."]
    for name, section in sections.items():
        entries = section.items() if isinstance(section, dict) and section else ()
        lines += [f"{name}:", *(f"  {key}: {_inline(value)}" for key, value in entries)] if entries else [
            f"{name}: {_inline(section)}"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def _evidence(sections: Sections) -> str:
    """Many small dictionaries: half the laptop's features, one thread for each of two trainings at a time."""
    sections["machine"] |= {"threads": 1}
    sections["corpus"] |= {"seed": 2}
    above = [{"layer": layer, "names": ["v", "v_shared_input"]} for layer in ("second", "adjacent")]
    sections["harvest"]["sites"] = [*sections["harvest"]["sites"][:1], *above]
    sections["training"] |= {"steps": _STEPS, "evaluate_every": _STEPS // 2, "checkpoint_every": _STEPS // 2}
    for kind, features in _FEATURES.items():
        sections["dictionaries"][kind]["features"] = features
        sections["dictionaries"][kind].get("training", {}).pop("steps", None)
    sections["evaluation"] |= {"splice_contexts": 2}
    wide = [f"{series}-s{seed}" for series in ("mtc-wide-k60", "value-both-wide-c") for seed in _SEEDS]
    sections["clusters"] |= {"runs": wide, "bootstraps": 1000}
    null = [f"{series}-k{k}" for series in ("mtc", "top1", "mtc-penalty-l1", "mtc-penalty-l2") for k in _ABLATED_KS]
    at_settings = [name for name, run in _settings(sections["training"]).items() if run["series"] == "mtc-settings"]
    sections["nulls"] = {
        "teacher": f"top1-k110-s{_FIRST}",
        "runs": [f"{run}-s{seed}" for run in null for seed in _SEEDS] + at_settings,
    }
    sections["planted"] |= {
        "seeds": list(range(10)), "commit_seed": True,
        "questions": ["recovery", "superposition", "shared_layers", "toys", "phases"],
        "toys": {"seeds": 3}, "phases": {"seeds": 2},
    }  # fmt: skip
    labelled = ("mtc-k60", "top1-k60", "joint-top1-k60", "sae-best-head-k60", "attn-out-k60")
    named = [f"{series}-s{seed}" for series in labelled for seed in _SEEDS]
    pairs = (("top1-k60", "joint-top1-k60"), ("mtc-k60", "joint-top1-k60"), ("top1-k60", "sae-best-head-k60"))
    matched = [[f"{series}-s{seed}" for series in pair] for pair in pairs for seed in _SEEDS]
    # Trained in this order: what most rules ask for comes first.
    sections["runs"] = {
        **_frontier_runs(), **_value_runs(_VALUES, _SEEDS, _COEFFICIENTS), **_ablations(_EVERY_SEED, _SEEDS),
        **_wide_runs(), **_value_runs(_VALUES_TWICE, _SEEDS, ("b", "d")), **_settings(sections["training"]),
        **_value_runs(_VALUES_ONCE, (_FIRST,), ("b", "d")), **_ablations(_FIRST_SEED, (_FIRST,)), **_l1_runs(),
        **_more_settings(sections), **_residual_runs(),
    }  # fmt: skip
    settings = [name for name, run in sections["runs"].items() if run["series"] in _DESCRIBED_SETTINGS]
    runs = [*named, f"value-both-c-s{_FIRST}"]
    # 500: the smallest p-value must lie below 5% over 18 settings.
    sections["meaning"] |= {"runs": runs, "settings": settings, "matched": matched, "simulations": 500}
    evidence_attention_(sections, _SEEDS)
    return (
        "The evidence profile: every claim with its seeds and controls; hours on two cores, with two workers at once."
    )


_SEEDS = (6, 7, 8)
_FIRST = _SEEDS[0]
_DESCRIBED_SETTINGS = ("mtc-settings", "top1-settings", "joint-top1-settings", "attn-out-sae-settings")
"""Series of whose runs at other settings it is told what their features mean."""
_KS = (15, 30, 60, 110)
_ABLATED_KS = (30, 110)
_STEPS = 240
_FEATURES = {"mtc": 1024, "joint_mtc": 1024, "sae_best_head": 1024, "attn_out_sae": 1024, "value_sae": 512}
_BOTH = 2 * _FEATURES["value_sae"]
_COEFFICIENTS = {"a": 4.0, "b": 2.0, "c": 1.0, "d": 0.5}
_FRONTIERS: dict[str, tuple[str, str, Sections]] = {
    "mtc": ("mtc", "superposition", {}),
    "top1": ("mtc", "superposition", {"heads_per_feature": 1}),
    "joint-top1": ("joint_mtc", "coupling", {"heads_per_feature": 1}),
    "sae-best-head": ("sae_best_head", "coupling", {}),
}
_FIRST_SEED: dict[str, tuple[str, str, Sections]] = {
    "top1-fixed": ("mtc", "superposition", {"heads_per_feature": 1, "assignment": "fixed"}),
    "mtc-resid": ("mtc", "superposition", {"target": "resid_out"}),
    "top1-resid": ("mtc", "superposition", {"target": "resid_out", "heads_per_feature": 1}),
    "mtc-nonnegative": ("mtc", "superposition", {"loadings_sign": "nonnegative"}),
}
_EVERY_SEED: dict[str, tuple[str, str, Sections]] = {
    "heads2": ("mtc", "superposition", {"heads_per_feature": 2}),
    "heads4": ("mtc", "superposition", {"heads_per_feature": 4}),
    "mtc-penalty-l1": ("mtc", "superposition", {"loadings_penalty": "l1"}),
    "mtc-penalty-l2": ("mtc", "superposition", {"loadings_penalty": "l2"}),
    "joint-mtc": ("joint_mtc", "coupling", {}),
}
# One layer, the other, both and the control; then other controls; then the adjacent pair and equal features.
_VALUES: dict[str, tuple[list[str], Sections]] = {
    "value-first": (["first"], {}),
    "value-second": (["second"], {}),
    "value-both": (["first", "second"], {"features": _BOTH}),
    "value-both-control": (["first", "second"], {"features": _BOTH, "control": "other_contexts"}),
}
_VALUES_TWICE: dict[str, tuple[list[str], Sections]] = {
    "value-both-matched": (["first", "second"], {"features": _BOTH, "control": "matched_tokens"}),
    "value-both-shared": (["first", "second"], {"features": _BOTH, "control": "shared_input"}),
    "value-second-shared": (["second"], {"control": "shared_input"}),
}
_VALUES_ONCE: dict[str, tuple[list[str], Sections]] = {
    "value-both-equal": (["first", "second"], {}),
    "value-adjacent": (["adjacent"], {}),
    "value-near": (["first", "adjacent"], {"features": _BOTH}),
    "value-near-control": (["first", "adjacent"], {"features": _BOTH, "control": "other_contexts"}),
    "value-near-matched": (["first", "adjacent"], {"features": _BOTH, "control": "matched_tokens"}),
    "value-near-shared": (["first", "adjacent"], {"features": _BOTH, "control": "shared_input"}),
    "value-adjacent-shared": (["adjacent"], {"control": "shared_input"}),
}


def _frontier_runs() -> Sections:
    """Four sparsities at three seeds of what the frontiers compare; attention-output SAEs at fewer."""
    runs: Sections = {}
    for seed in _SEEDS:
        for series, (kind, family, own) in _FRONTIERS.items():
            for k in _KS:
                runs[f"{series}-k{k}-s{seed}"] = _top_k(kind, series, family, k, seed, own)
        for k in _KS if seed == _FIRST else (60,):
            runs[f"attn-out-k{k}-s{seed}"] = _top_k("attn_out_sae", "attn-out-sae", "attention-output", k, seed)
    return runs


def _value_runs(table: dict[str, tuple[list[str], Sections]], seeds: Iterable[int], letters: Iterable[str]) -> Sections:
    """Value SAEs at some of the coefficients."""
    return {
        f"{series}-{letter}-s{seed}": _value(series, layers, _COEFFICIENTS[letter], seed, own)
        for seed in seeds
        for series, (layers, own) in table.items()
        for letter in letters
    }


def _ablations(table: dict[str, tuple[str, str, Sections]], seeds: Iterable[int]) -> Sections:
    """Two sparsities each."""
    return {
        f"{series}-k{k}-s{seed}": _top_k(kind, series, family, k, seed, own)
        for seed in seeds
        for series, (kind, family, own) in table.items()
        for k in _ABLATED_KS
    }


def _residual_runs() -> Sections:
    """The residual target at the sparsities that ablations leave out: two points gave an interval of 0.71 to 1.10."""
    return {
        f"{series}-k{k}-s{_FIRST}": _top_k("mtc", series, "superposition", k, _FIRST, _FIRST_SEED[series][2])
        for series in ("mtc-resid", "top1-resid")
        for k in _KS
        if k not in _ABLATED_KS
    }


def _wide_runs() -> Sections:
    """Twice as many features, for clusters."""
    runs: Sections = {}
    for seed in _SEEDS:
        own = {"features": 2 * _FEATURES["mtc"]}
        runs[f"mtc-wide-k60-s{seed}"] = _top_k("mtc", "mtc-wide", "superposition", 60, seed, own)
        own = {"features": 2 * _BOTH}
        runs[f"value-both-wide-c-s{seed}"] = _value("value-both-wide", ["first", "second"], 1.0, seed, own)
    return runs


def _l1_runs() -> Sections:
    """MTC and Top-1 under every norm of head loadings as a penalty; under top-k it only ranks features."""
    runs: Sections = {}
    for end, norm in {"": {}, "-norm-l1": {"loadings_penalty": "l1"}, "-norm-l2": {"loadings_penalty": "l2"}}.items():
        for name, heads in (("mtc", {}), ("top1", {"heads_per_feature": 1})):
            for letter, coefficient in {"a": 2.0, "b": 0.5}.items():
                sparsity = {"kind": "l1", "coefficient": coefficient, "negative_coefficient": 0.0005}
                series = f"{name}-l1{end}"
                run = _top_k("mtc", series, "superposition", 0, _FIRST, norm | heads)
                runs[f"{series}-{letter}-s{_FIRST}"] = run | {"sparsity": sparsity}
    return runs


_RATES = (0.5, 1.0, 2.0)
_LENGTHS = (0.25, 0.5)
_STARTS: dict[str, Sections] = {
    "maps": {"start": "value_maps", "start_tokens": "uniform"},
    "energy": {"start": "value_maps", "start_tokens": "energy"},
    "random": {"start": "random"},
}


def _settings(training: Sections) -> Sections:
    """What a verdict compares, at one sparsity and seed: three learning rates, two lengths, three starts of MTCs."""
    runs: Sections = {}
    for start, own in _STARTS.items():
        for rate, length in product(_RATES, _LENGTHS):
            for series, heads in (("mtc", {}), ("top1", {"heads_per_feature": 1})):
                run = _top_k("mtc", f"{series}-settings", "robustness", 60, _FIRST, own | heads)
                runs[_setting(f"{series}-{start}", rate, length)] = run | {"training": _plan(training, rate, length)}
    return runs


def _more_settings(sections: Sections) -> Sections:
    """The same for other sides of coupling, attention outputs and value layers."""
    runs: Sections = {}
    training = sections["training"]
    of_values, of_outputs = (training | sections["dictionaries"][kind].get("training", {})
                             for kind in ("value_sae", "attn_out_sae"))  # fmt: skip
    for rate, length in product(_RATES, _LENGTHS):
        for series in ("joint-top1", "sae-best-head"):
            kind, _, own = _FRONTIERS[series]
            run = _top_k(kind, f"{series}-settings", "robustness", 60, _FIRST, own)
            runs[_setting(series, rate, length)] = run | {"training": _plan(training, rate, length)}
        run = _top_k("attn_out_sae", "attn-out-sae-settings", "robustness", 60, _FIRST)
        runs[_setting("attn-out", rate, length)] = run | {"training": _plan(of_outputs, rate, length)}
    for rate, length in product(_RATES, _LENGTHS):
        for series, (layers, own) in _VALUES.items():
            run = _value(f"{series}-settings", layers, _COEFFICIENTS["b"], _FIRST, own) | {"family": "robustness"}
            runs[_setting(series, rate, length)] = run | {"training": _plan(of_values, rate, length)}
    return runs


def _plan(training: Sections, rate: float, length: float) -> Sections:
    return {"learning_rate": rate * training["learning_rate"], "steps": round(length * training["steps"])}


def _setting(name: str, rate: float, length: float) -> str:
    # In percent: DVC reads a dot in a name as a level of the parameter file.
    return f"{name}-rate{rate:.0%}-length{length:.0%}".replace("%", "")


def _top_k(kind: str, series: str, family: str, k: int, seed: int, own: Sections | None = None) -> Sections:
    sparsity = {"kind": "batch_topk", "k": k}
    return {"kind": kind, "series": series, "family": family, "layers": ["first"], "seed": seed, "sparsity": sparsity,
            **copy.deepcopy(own or {})}  # fmt: skip


def _value(series: str, layers: list[str], coefficient: float, seed: int, own: Sections) -> Sections:
    sparsity = {"kind": "l1", "coefficient": coefficient, "negative_coefficient": 0.001}
    return {"kind": "value_sae", "series": series, "family": "value-layers", "layers": list(layers), "seed": seed,
            "sparsity": sparsity, **copy.deepcopy(own)}  # fmt: skip


def _gpu(sections: Sections) -> str:
    sections["machine"] = {"device": "cuda", "threads": 8}
    sections["corpus"] |= {"train_contexts": 8192, "heldout_contexts": 256, "contexts_per_document": 256}
    sections["harvest"] |= {"batch_contexts": 64, "shard_contexts": 256}
    sections["training"] |= {
        "steps": 8000, "contexts_per_batch": 16, "warmup_steps": 400, "learning_rate": 1e-3, "autocast": "bf16",
        "evaluate_every": 1000, "checkpoint_every": 1000, "start_contexts": 64, "calibrate_contexts": 128,
    }  # fmt: skip
    sections["training"]["engine"] |= {"tile_mib": 256.0, "shares_mib": 1024.0}
    sections["runs"] |= _gpu_runs(sections["runs"]["value-both-b"]["features"])
    for kind in ("mtc", "joint_mtc", "sae_best_head"):
        sections["dictionaries"][kind]["features"] = 100_000
    for defaults in sections["dictionaries"].values():
        defaults.pop("training", None)
    for run in sections["runs"].values():
        run.pop("training", None)
    sections["evaluation"] |= {"splice_contexts": 64}
    gpu_attention_(sections)
    return (
        "The gpu profile: 100,000 features per MTC, 33 million tokens (16 passes; a hub corpus has more), bf16.\n"
        "# The prices in training.engine.costs are a CPU's until `make calibrate PROFILE=gpu` has run on the GPU."
    )


def _gpu_runs(both: int) -> Sections:
    """What the laptop's hour has no room for: more sparsities, few movers, joint MTCs, the residual target."""
    tables = _FRONTIERS | _EVERY_SEED | _FIRST_SEED
    names = {"mtc-k200": ("mtc", 200), "top1-k200": ("top1", 200), "heads2-k60": ("heads2", 60),
             "heads4-k60": ("heads4", 60), "joint-mtc-k60": ("joint-mtc", 60), "joint-mtc-k110": ("joint-mtc", 110),
             "resid-k60": ("mtc-resid", 60)}  # fmt: skip
    runs = {name: _top_k(tables[s][0], s, tables[s][1], k, 0, tables[s][2]) for name, (s, k) in names.items()}
    for series in ("value-first", "value-second", "value-both"):
        layers, own = _VALUES[series]
        own = own | ({"features": both} if "features" in own else {})
        runs[f"{series}-a"] = _value(series, layers, _COEFFICIENTS["a"], 0, own)
    runs["attn-out-k30"] = _top_k("attn_out_sae", "attn-out-sae", "attention-output", 30, 0)
    return runs
