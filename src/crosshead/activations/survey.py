"""The survey: what every attention head of the base model does, and which layers the main job looks at.

Each score is the attention a head gives to one kind of earlier position, averaged over the queries t that have one
(s is a key, tokens[0] is the beginning-of-text token, which is neither a query nor a match):

- induction: the positions s after an earlier occurrence of the current token, tokens[s-1] = tokens[t], 1 < s < t
  (after Olsson et al. 2022, in-context learning and induction heads);
- duplicate token: earlier occurrences themselves, tokens[s] = tokens[t], s < t;
- previous token: s = t - 1 (for t > 1);
- first token: s = 0.

They are measured on random tokens repeated once, where nothing but repetition can be attended to, and on text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.capture import capture
from crosshead.activations.corpus import Corpus
from crosshead.dictionaries.base import Site
from crosshead.io.files import atomic_directory, read_json, write_json

__all__ = ["SCORES", "LayerChoice", "Survey", "SurveyConfig", "choose_layers", "head_scores", "load_layers", "survey"]

SCORES = ("induction", "previous_token", "duplicate_token", "first_token")
LayerRole = Literal["first", "second", "adjacent"]


class LayerChoice(BaseModel):
    """Layers named by hand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: Annotated[int, Field(ge=0)]
    """The layer of the one-layer dictionaries, and the lower of the far pair."""
    second: Annotated[int, Field(ge=0)]
    """The upper layer of the far pair."""
    adjacent: Annotated[int, Field(ge=0)]
    """The layer that is paired with the first as its neighbour."""


class SurveyConfig(BaseModel):
    """How much to measure, and how to choose layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequences: PositiveInt = 8
    """Sequences of repeated random tokens."""
    length: Annotated[int, Field(ge=4)] = 128
    """Random tokens per sequence before they repeat; a context is 1 + 2 * length tokens."""
    text_contexts: PositiveInt = 8
    """Training contexts of the corpus to measure on."""
    min_gap: PositiveInt = 6
    """Layers of the far pair are at least this far apart."""
    layers: Literal["auto"] | LayerChoice = "auto"
    """``auto``: the clearest induction layers; or {first, second, adjacent} by hand."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes the random tokens."""


@dataclass(frozen=True)
class Survey:
    """Scores of every head and the layers they lead to."""

    heads: list[dict[str, float]]
    """One record per head: layer, head, each of SCORES on random tokens, and text_<score> on text."""
    layers: dict[LayerRole, int]
    """The chosen layers."""
    layer_scores: list[float]
    """Induction score of every layer; see ``choose_layers``."""
    n_random_tokens: int
    n_text_tokens: int

    def save(self, directory: Path | str) -> None:
        """Write survey.json (the heads), layers.json (the choice) and summary.json (the rest)."""
        with atomic_directory(directory) as target:
            write_json(target / "survey.json", self.heads)
            write_json(target / "layers.json", self.layers)
            write_json(target / "summary.json", {"layer_scores": self.layer_scores,
                       "n_random_tokens": self.n_random_tokens, "n_text_tokens": self.n_text_tokens})  # fmt: skip

    @classmethod
    def load(cls, directory: Path | str) -> "Survey":
        """Read what ``save`` wrote."""
        directory = Path(directory)
        return cls(read_json(directory / "survey.json"), load_layers(directory),
                   **read_json(directory / "summary.json"))  # fmt: skip


def load_layers(directory: Path | str) -> dict[LayerRole, int]:
    """The layers a saved survey chose: first, second, adjacent."""
    return read_json(Path(directory) / "layers.json")


def survey(model: LanguageModel, corpus: Corpus, config: SurveyConfig) -> Survey:
    """Score every head on repeated random tokens and on text, and choose layers.

    ValueError for contexts longer than the model allows, more text contexts than the corpus holds, layers out of
    range, or a model with too few layers for ``min_gap``.
    """
    n_layers, n_heads = model.dims.n_layers, model.dims.n_heads
    if corpus.n_contexts("train") < config.text_contexts:
        raise ValueError(f"survey.text_contexts={config.text_contexts} exceeds the corpus's "
                         f"{corpus.n_contexts('train')} training contexts; lower it")  # fmt: skip
    if config.layers == "auto":
        _refuse_small_gap(n_layers, config.min_gap)
    else:
        _refuse_absent_layers(config.layers, n_layers)
    random_tokens = repeated_random_tokens(model, config.sequences, config.length, config.seed)
    on_random = head_scores(model, random_tokens)
    text = corpus.tokens("train", slice(config.text_contexts))
    on_text = head_scores(model, text)
    heads = [
        {"layer": layer, "head": head}
        | {name: round(on_random[name][layer, head].item(), 6) for name in SCORES}
        | {f"text_{name}": round(on_text[name][layer, head].item(), 6) for name in SCORES}
        for layer in range(n_layers)
        for head in range(n_heads)
    ]
    layer_scores = [max(row["induction"] for row in heads if row["layer"] == layer) for layer in range(n_layers)]
    layers = choose_layers(layer_scores, config.min_gap) if config.layers == "auto" else config.layers.model_dump()
    return Survey(heads, layers, layer_scores, random_tokens.numel(), text.numel())
