"""The survey: what every attention head of the base model does, and which layers the main job looks at.

Each score is the attention a head gives to one kind of earlier position, averaged over the queries t that have one
(s is a key, tokens[0] is the beginning-of-text token, which is neither a query nor a match):

- induction: the positions s after an earlier occurrence of the current token, tokens[s-1] = tokens[t], 1 < s < t
  (after Olsson et al. 2022, in-context learning and induction heads);
- duplicate token: earlier occurrences themselves, tokens[s] = tokens[t], s < t;
- previous token: s = t - 1 (for t > 1);
- first token: s = 0.

They are measured on random tokens repeated once, where nothing but repetition can be attended to, and on text.

Shape legend: B contexts, H query heads, T positions, E head width, K key/value heads, S kinds of position (SCORES),
X = T * T pairs of a query and a key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag, field_validator, model_validator
from torch import Tensor

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.capture import attention_specs, capture
from crosshead.activations.corpus import Corpus
from crosshead.dictionaries.base import Site
from crosshead.io.files import atomic_directory, read_json, write_json
from crosshead.maths.patterns import attention_patterns

__all__ = ["SCORES", "LayerChoice", "Survey", "SurveyConfig", "choose_layers", "head_scores", "load_layers",
           "repeated_random_tokens", "survey"]  # fmt: skip

SCORES = ("induction", "previous_token", "duplicate_token", "first_token")
LayerRole = Literal["first", "second", "adjacent"]
CONTEXTS_AT_A_TIME = 2


class LayerChoice(BaseModel):
    """Layers named by hand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: Annotated[int, Field(ge=0)]
    """The layer of the one-layer dictionaries, and the lower of the far pair."""
    second: Annotated[int, Field(ge=0)]
    """The upper layer of the far pair."""
    adjacent: Annotated[int, Field(ge=0)]
    """The layer above the first that is paired with it as its neighbour. Above, because the controls of both pairs are
    made from the first layer, the lowest."""

    @model_validator(mode="after")
    def _pairs_are_pairs(self) -> "LayerChoice":
        if self.first in (self.second, self.adjacent):
            raise ValueError(f"survey.layers: first={self.first} must differ from second={self.second} and "
                             f"adjacent={self.adjacent}")  # fmt: skip
        if self.adjacent < self.first:
            raise ValueError(f"survey.layers: adjacent={self.adjacent} lies below first={self.first}; name the layer "
                             "above it")  # fmt: skip
        return self


def _way_of_choosing(layers: Any) -> str:
    """Which member of the union a value is meant as: faults are then told for that one only."""
    return "auto" if isinstance(layers, str) else "by hand"


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
    layers: Annotated[
        Annotated[Literal["auto"], Tag("auto")] | Annotated[LayerChoice, Tag("by hand")],
        Discriminator(_way_of_choosing),
    ] = "auto"
    """``auto``: the clearest induction layers; or by hand {first, second, adjacent}, or a list of these three."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes the random tokens."""

    @field_validator("layers", mode="before")
    @classmethod
    def _list_in_order(cls, layers: Any) -> Any:
        if isinstance(layers, str | Mapping | LayerChoice):
            return layers
        if not isinstance(layers, list | tuple) or len(layers) != len(LayerChoice.model_fields):
            raise ValueError(f"got survey.layers = {layers!r}; write auto or three layers, [first, second, adjacent]")
        if wrong := [layer for layer in layers if type(layer) is not int or layer < 0]:
            raise ValueError(f"survey.layers lists {wrong[0]!r}; layers are numbers from 0 on")
        return dict(zip(LayerChoice.model_fields, layers, strict=True))

    @model_validator(mode="after")
    def _second_lies_above(self) -> "SurveyConfig":
        if isinstance(self.layers, LayerChoice) and self.layers.first > self.layers.second:
            raise ValueError(f"survey.layers: first={self.layers.first} lies above second={self.layers.second}; "
                             "exchange them")  # fmt: skip
        return self


@dataclass(frozen=True)
class Survey:
    """Scores of every head and the layers they lead to."""

    heads: list[dict[str, float]]
    """One record per head: layer, head, each of SCORES on random tokens, and text_<score> on text."""
    layers: LayerChoice
    """The chosen layers."""
    layer_scores: list[float]
    """Induction score of every layer; see ``choose_layers``."""
    n_random_tokens: int
    n_text_tokens: int
    layers_chosen_by: Literal["survey", "parameters"]

    def save(self, directory: Path | str) -> None:
        """Write survey.json (the heads), layers.json (the choice) and summary.json (the rest)."""
        with atomic_directory(directory) as target:
            write_json(target / "survey.json", self.heads)
            write_json(target / "layers.json", self.layers.model_dump())
            write_json(target / "summary.json", {"layer_scores": self.layer_scores,
                       "n_random_tokens": self.n_random_tokens, "n_text_tokens": self.n_text_tokens,
                       "layers_chosen_by": self.layers_chosen_by})  # fmt: skip

    @classmethod
    def load(cls, directory: Path | str) -> "Survey":
        """Read what ``save`` wrote."""
        directory = Path(directory)
        return cls(read_json(directory / "survey.json"), LayerChoice(**load_layers(directory)),
                   **read_json(directory / "summary.json"))  # fmt: skip


def load_layers(directory: Path | str) -> dict[LayerRole, int]:
    """The layers a saved survey chose: first, second, adjacent."""
    return read_json(Path(directory) / "layers.json")


def survey(model: LanguageModel, corpus: Corpus, config: SurveyConfig) -> Survey:
    """Score every head on repeated random tokens and on text, and choose layers.

    ValueError for contexts longer than the model allows, more text contexts than the corpus holds, a corpus of another
    tokenizer, layers out of range, or a model with too few layers for ``min_gap``.
    """
    n_layers, n_heads = model.dims.n_layers, model.dims.n_heads
    _check_layers(config, n_layers)
    corpus.check_tokenizer(model.tokenizer)
    if corpus.n_contexts("train") < config.text_contexts:
        raise ValueError(f"survey.text_contexts={config.text_contexts} exceeds the corpus's "
                         f"{corpus.n_contexts('train')} training contexts; lower it")  # fmt: skip
    random_tokens = repeated_random_tokens(model, config.sequences, config.length, config.seed)
    text_tokens = corpus.tokens("train", slice(config.text_contexts))
    scores = head_scores(model, random_tokens)
    scores |= {f"text_{name}": score for name, score in head_scores(model, text_tokens).items()}
    heads = [
        {"layer": layer, "head": head} | {name: round(score[layer, head].item(), 6) for name, score in scores.items()}
        for layer in range(n_layers)
        for head in range(n_heads)
    ]
    layer_scores = [round(score, 6) for score in scores["induction"].sum(1).tolist()]
    if isinstance(config.layers, LayerChoice):
        layers = config.layers
    else:
        layers = choose_layers(layer_scores, config.min_gap)
    chosen_by = "parameters" if isinstance(config.layers, LayerChoice) else "survey"
    return Survey(heads, layers, layer_scores, random_tokens.numel(), text_tokens.numel(), chosen_by)


def _check_layers(config: SurveyConfig, n_layers: int) -> None:
    if isinstance(config.layers, LayerChoice):
        for role, layer in config.layers:
            if layer >= n_layers:
                raise ValueError(f"survey.layers.{role}={layer} is out of range; the model has layers "
                                 f"0 to {n_layers - 1}")  # fmt: skip
    elif n_layers <= config.min_gap:
        raise ValueError(f"survey.min_gap={config.min_gap} leaves no pair among the model's {n_layers} layers; lower "
                         "it, or name the layers in survey.layers")  # fmt: skip


def choose_layers(layer_scores: Sequence[float], min_gap: int) -> LayerChoice:
    """Choose the layers with the clearest induction heads (design choice).

    A layer's score is the sum of its heads' induction scores on repeated random tokens. ``first`` and ``second`` are
    the pair at least ``min_gap`` layers apart whose scores have the largest sum, ties to the lower layer; ``adjacent``
    is the layer above ``first``.
    """
    n_layers = len(layer_scores)
    assert 0 < min_gap < n_layers, "the caller checks that a pair exists"
    pairs = [(a, b) for a, b in combinations(range(n_layers), 2) if b - a >= min_gap]
    first, second = max(pairs, key=lambda pair: layer_scores[pair[0]] + layer_scores[pair[1]])
    return LayerChoice(first=first, second=second, adjacent=first + 1)


def repeated_random_tokens(model: LanguageModel, sequences: int, length: int, seed: int) -> Int[Tensor, "n T"]:
    """Contexts [BOS, r_1..r_length, r_1..r_length] of distinct random tokens, none of them special.

    ValueError when the context is longer than the model allows, or ``length`` exceeds the vocabulary.
    """
    if model.context_limit is not None and 1 + 2 * length > model.context_limit:
        raise ValueError(f"survey.length={length} makes contexts of {1 + 2 * length} tokens, the model allows "
                         f"{model.context_limit}; lower it to {(model.context_limit - 1) // 2} at most")  # fmt: skip
    special = {*model.tokenizer.all_special_ids, *model.tokenizer.added_tokens_decoder, model.bos_id}
    ordinary = torch.tensor([token for token in range(len(model.tokenizer)) if token not in special])
    if length > len(ordinary):
        raise ValueError(f"survey.length={length} exceeds the {len(ordinary)} ordinary tokens; lower it")
    generator = torch.Generator().manual_seed(seed)
    halves = torch.stack([ordinary[torch.randperm(len(ordinary), generator=generator)[:length]]
                          for _ in range(sequences)])  # fmt: skip
    return torch.cat([torch.full((sequences, 1), model.bos_id), halves, halves], dim=1)


@torch.no_grad()
def head_scores(model: LanguageModel, tokens: Int[Tensor, "n T"]) -> dict[str, Float[Tensor, "layers heads"]]:
    """Mean attention on each kind of position (SCORES; definitions in the module's docstring), float64, on the CPU.

    A score is 0 where no query has such a position (no token occurs twice).
    """
    layers = range(model.dims.n_layers)
    sites = [Site(layer, name) for layer in layers for name in ("q", "k")]
    specs = attention_specs(model, layers)
    mass = torch.zeros(len(SCORES), model.dims.n_layers, model.dims.n_heads, dtype=torch.float64)
    n_queries = torch.zeros(len(SCORES), 1, 1, dtype=torch.float64)
    for group in tokens.split(CONTEXTS_AT_A_TIME):
        kinds = position_kinds(group)
        kinds_BSTT = torch.stack([kinds[name] for name in SCORES], dim=1)
        n_queries += kinds_BSTT.any(-1).sum((0, 2)).view(-1, 1, 1)
        keys_BXS = kinds_BSTT.flatten(2).transpose(1, 2).to(model.device, torch.float32)
        found = capture(model, group, sites)
        # One layer's patterns at a time: those of all layers would not fit for long contexts.
        for layer in layers:
            q_BHTE, k_BKTE = found[Site(layer, "q")].float(), found[Site(layer, "k")].float()
            pattern_BHX = attention_patterns(q_BHTE, k_BKTE, specs[layer]).flatten(2)
            mass[:, layer] += (pattern_BHX @ keys_BXS).sum(0).T.double().cpu()
    return dict(zip(SCORES, mass / n_queries.clamp_min(1), strict=True))


def position_kinds(tokens: Int[Tensor, "B T"]) -> dict[str, Bool[Tensor, "B T T"]]:
    """For every score, which keys s (last axis) of which queries t count; see the module's docstring."""
    position = torch.arange(tokens.shape[1])
    t, s = position[:, None], position[None, :]
    same = tokens[:, :, None] == tokens[:, None, :]
    same = same & (t > 0) & (s > 0)
    after_same = torch.zeros_like(same)
    after_same[:, :, 1:] = same[:, :, :-1]
    return {
        "induction": after_same & (s < t),
        "previous_token": ((s == t - 1) & (t > 1)).expand_as(same),
        "duplicate_token": same & (s < t),
        "first_token": ((s == 0) & (t > 0)).expand_as(same),
    }
