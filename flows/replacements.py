"""Look into attention replacement layers: skip-trigram and induction heads, and description lengths beside others'."""

from collections.abc import Sequence
from typing import Any

from crosshead.activations.base_model import load_model
from crosshead.activations.cache import ActivationSource
from crosshead.activations.machine import Machine
from crosshead.analysis.description_length import describe
from crosshead.analysis.induction_heads import find_induction_heads
from crosshead.analysis.replacement_study import ReplacementsConfig, code_row, heads_row
from crosshead.analysis.skip_trigrams import Reader, find_skip_trigrams
from crosshead.attention.registry import load_attention_model
from crosshead.dictionaries.base import Batch, Site
from crosshead.dictionaries.registry import load_dictionary
from crosshead.io.files import atomic_directory, write_json
from crosshead.training.attention_runs import ATTENTION
from crosshead.training.runs import Run, read_run
from flows._attention_runs import read_attention_run
from flows._inputs import open_cache
from flows._runtime import Stage, main

_CONTEXTS_PER_BATCH = 4


def replacements(stage: Stage) -> None:
    """Search the heads of every run that ``replacements.heads_of`` names; measure the codes of ``codes_of``."""
    config = stage.section("replacements", ReplacementsConfig)
    device = stage.section("machine", Machine).prepare()
    cache = open_cache(stage, device)
    model = load_model(stage.data / "model", device=device)
    heads, codes = [], []
    for name in config.heads_of:
        run, module = _load(stage, name, "heads_of")
        module.to(device)
        if run.kind != "replacement":
            raise ValueError(f"{stage.source}: replacements.heads_of names {name!r}, a {run.kind}; name replacement "
                             "layers only")  # fmt: skip
        readers = [_reader(cache, split, module.sites, device) for split in ("train", "heldout")]
        trigrams = find_skip_trigrams(
            module, model,
            (readers[0], min(config.trigram_train_contexts, cache.n_contexts("train"))),
            (readers[1], min(config.trigram_heldout_contexts, cache.n_contexts("heldout"))),
            heads=config.trigram_heads, events=config.trigram_events,
        )  # fmt: skip
        induction = find_induction_heads(
            module, model, sequences=config.sequences, length=config.length, seed=config.seed
        )
        heads.append(heads_row(run, trigrams, induction))
    for name in config.codes_of:
        run, module = _load(stage, name, "codes_of")
        module.to(device)
        train = _first(cache, "train", config.code.train_contexts, module.sites, device)
        heldout = _first(cache, "heldout", config.code.heldout_contexts, module.sites, device)
        codes.append(code_row(run, module.config.features, describe(module, train, heldout, config.code)))
    with atomic_directory(stage.data / "replacements") as directory:
        write_json(directory / "replacements.json", {"heads": heads, "description_lengths": codes})


def _load(stage: Stage, name: str, key: str) -> tuple[Run, Any]:
    """A run of either section, and its model."""
    if name in (stage.sections.get(ATTENTION.runs) or {}):
        return read_attention_run(stage, name), load_attention_model(stage.data / "attention" / name)
    entries = stage.sections.get("runs") or {}
    if name not in entries:
        raise ValueError(f"{stage.source}: replacements.{key} names {name!r}, which is neither under attention_runs "
                         "nor under runs; correct it")  # fmt: skip
    kind = entries[name].get("kind") if isinstance(entries[name], dict) else None
    defaults = (stage.sections.get("dictionaries") or {}).get(kind) or {}
    run = read_run(name, entries[name], defaults, stage.sections.get("training") or {}, stage.source)
    return run, load_dictionary(stage.data / "runs" / name)


def _reader(cache: ActivationSource, split: str, sites: Sequence[Site], device: str) -> Reader:
    return lambda contexts: cache.read(split, contexts, sites, device=device)


def _first(cache: ActivationSource, split: str, n_contexts: int, sites: Sequence[Site], device: str) -> list[Batch]:
    """The first contexts of a split, in batches."""
    end = min(n_contexts, cache.n_contexts(split))
    return [cache.read(split, range(i, min(i + _CONTEXTS_PER_BATCH, end)), sites, device=device)
            for i in range(0, end, _CONTEXTS_PER_BATCH)]  # fmt: skip


if __name__ == "__main__":
    main(replacements)
