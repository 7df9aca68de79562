"""A small corpus and a small harvest for the tests of this folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.corpus import Corpus
from crosshead.activations.harvest import HarvestConfig, harvest
from crosshead.io.files import fingerprint

LENGTH = 12
SITES = ({"layer": "first", "names": ["q", "k", "v", "resid_in", "attn_out"]}, {"layer": 2, "names": ["v", "resid_in"]})
LAYERS = {"first": 1, "second": 2}


def make_corpus(
    model: LanguageModel,
    train: int = 10,
    heldout: int = 5,
    length: int = LENGTH,
    seed: int = 0,
    n_tokens: int | None = None,
) -> Corpus:
    """Random contexts of two domains that begin with token 0; the others are all of the model's or the first few."""
    vocabulary = n_tokens or len(model.tokenizer.get_vocab())
    tokens = torch.randint(1, vocabulary, (train + heldout, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    flat = pa.array(tokens.flatten().numpy().astype("int32"))
    domains = [("prose", "code")[i % 2] for i in range(train + heldout)]
    table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(flat, length), "domain": domains})
    manifest = {
        "n_contexts": {"train": train, "heldout": heldout},
        "vocabulary": fingerprint(model.tokenizer.get_vocab()),
    }
    return Corpus(length, 0, fingerprint(tokens.tolist()), manifest, table)


def make_config(**changes: Any) -> HarvestConfig:
    """Several shards, several groups in each, and an uneven end."""
    settings: dict[str, Any] = {"sites": SITES, "shard_contexts": 4, "batch_contexts": 3}
    return HarvestConfig.model_validate(settings | changes)


def run_harvest(
    model: LanguageModel, tmp_path: Path, config: HarvestConfig | None = None, corpus: Corpus | None = None, **more: Any
) -> Path:
    """Harvest into tmp_path/cache."""
    directory = tmp_path / "cache"
    harvest(model, corpus or make_corpus(model), config or make_config(), LAYERS, directory,
            work=tmp_path / "work", **more)  # fmt: skip
    return directory


def file_bytes(directory: Path) -> Mapping[str, bytes]:
    """Every file of a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
