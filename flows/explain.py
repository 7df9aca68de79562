"""Induction features among QK features, explained attention decisions, and QK layers whose truth is known."""

from crosshead.activations.base_model import load_model
from crosshead.activations.batches import Batches
from crosshead.activations.machine import Machine
from crosshead.analysis.explaining import ExplainConfig, explained
from crosshead.attention.qk_diagonal import Module
from crosshead.attention.registry import load_attention_model
from crosshead.io.files import atomic_directory, write_json
from flows._attention_runs import read_attention_run
from flows._inputs import open_cache
from flows._runtime import Stage, main


def explain(stage: Stage) -> None:
    """Look into the runs that ``explain.runs`` names and explain the decisions of ``explain.decisions``."""
    config = stage.section("explain", ExplainConfig)
    device = stage.section("machine", Machine).prepare()
    runs = {name: read_attention_run(stage, name) for name in config.runs}
    for run in runs.values():
        if run.kind != "qk_diagonal":
            raise ValueError(f"{stage.source}: explain.runs names {run.name!r}, a {run.kind}; name runs of qk_diagonal")
    cache = open_cache(stage, device)
    modules, heldout = {}, {}
    for name in runs:
        module = load_attention_model(stage.data / "attention" / name).to(device)
        assert isinstance(module, Module)
        modules[name] = module
        batches = Batches(cache, "heldout", module.sites, 4, 0, device=device)
        heldout[name] = batches.sample(config.induction.text_contexts, config.induction.seed)
    model = load_model(stage.data / "model", device=device)
    record = explained(modules, {name: run.seed for name, run in runs.items()}, model, heldout, config)
    with atomic_directory(stage.data / "explain") as directory:
        write_json(directory / "explain.json", record)


if __name__ == "__main__":
    main(explain)
