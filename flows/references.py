"""Measure the reference points that every frontier is drawn with."""

from crosshead.activations.batches import Batches
from crosshead.activations.machine import Machine
from crosshead.analysis.references import ReferenceConfig, attention_references, reference_sites
from crosshead.dictionaries.base import LayerWeights
from crosshead.io.files import atomic_directory, read_json, write_json
from flows._inputs import open_cache
from flows._runtime import Stage, main

_CONTEXTS_PER_BATCH = 4


def references(stage: Stage) -> None:
    """Fit the references on training contexts, measure them on held-out ones."""
    config = stage.section("references", ReferenceConfig)
    device = stage.section("machine", Machine).prepare()
    layer = read_json(stage.data / "survey" / "layers.json")["first"]
    cache = open_cache(stage, device)
    weights = LayerWeights(*(tensor.to(device) for tensor in cache.weights()[layer]))
    splits = {split: Batches(cache, split, reference_sites(layer), _CONTEXTS_PER_BATCH, 0, device=device)
              for split in ("train", "heldout")}  # fmt: skip
    record = attention_references(
        splits["train"].sample(config.train_contexts, 0), splits["heldout"].all(), layer, weights, config
    )
    with atomic_directory(stage.data / "references") as directory:
        write_json(directory / "references.json", record)


if __name__ == "__main__":
    main(references)
