"""Run the base model over the corpus and cache its activations."""

from tqdm import tqdm

from crosshead.activations.base_model import load_model
from crosshead.activations.corpus import Corpus
from crosshead.activations.harvest import HarvestConfig
from crosshead.activations.harvest import harvest as harvest_activations
from crosshead.activations.machine import Machine
from crosshead.io.files import read_json
from flows._runtime import Stage, main, repository_root


def harvest(stage: Stage) -> None:
    """Cache activations; a killed harvest goes on at its first missing shard."""
    config = stage.section("harvest", HarvestConfig)
    device = stage.section("machine", Machine).prepare()
    layers = read_json(stage.data / "survey" / "layers.json")
    language_model = load_model(stage.data / "model", device=device)
    corpus = Corpus.load(stage.data / "corpus")
    with tqdm(desc="harvest", unit="context", mininterval=5) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        harvest_activations(
            language_model, corpus, config, layers, stage.data / "cache",
            work=repository_root() / "work", code=stage.identity((), ()), progress=progress,
        )  # fmt: skip


if __name__ == "__main__":
    main(harvest)
