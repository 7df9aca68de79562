"""Activations computed at every reading: a corpus through a base model, without a cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.cache import ActivationSource, read_manifest
from crosshead.activations.capture import capture
from crosshead.activations.corpus import SPLITS, Corpus, Split
from crosshead.dictionaries.base import Site

__all__ = ["LiveActivations"]


class LiveActivations(ActivationSource):
    """What a harvest in the mode ``stream`` describes.

    The same contexts in the same order as a cache would give, and the same activations up to how the model rounds in
    another grouping of contexts. Nothing is kept: every reading is a forward pass to the deepest site asked for.
    """

    def __init__(self, directory: Path | str, model: LanguageModel, corpus: Corpus):
        directory = Path(directory)
        super().__init__(directory, read_manifest(directory, model=model.fingerprint, corpus=corpus.fingerprint))
        self._model, self._corpus = model, corpus

    def n_contexts(self, split: str) -> int:
        return self._corpus.n_contexts(_known(split))

    def domains(self, split: str) -> list[str]:
        return self._corpus.domains(_known(split))

    def tokens(self, split: str, indices: Sequence[int]) -> Tensor:
        return torch.cat([self._corpus.tokens(_known(split), slice(index, index + 1)) for index in indices])

    def stored(self, split: str, indices: Sequence[int], sites: Sequence[Site]) -> dict[Site, Tensor]:
        captured = capture(self._model, self.tokens(split, indices), sites, shared_from=self.lowest_layer)
        for site, tensor in captured.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"site {site} holds values that are not finite; run the model in float32")
        return {site: tensor.float() for site, tensor in captured.items()}

    def rows(
        self, split: str, contexts: np.ndarray, positions: np.ndarray, sites: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "n *widths"]]:
        raise ValueError(f"{self.directory} is of a harvest that only streams: single positions of many contexts would "
                         "be as many forward passes for every batch; run the harvest stage with "
                         "harvest.mode: cache")  # fmt: skip


def _known(split: str) -> Split:
    if split not in SPLITS:
        raise ValueError(f"the corpus has no split {split!r}; it has {', '.join(SPLITS)}")
    return cast(Split, split)
