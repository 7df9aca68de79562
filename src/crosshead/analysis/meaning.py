"""What features and clusters mean: labels, predictability, enrichment and OV dimension of a list of dictionaries.

Three kinds of contexts: held-out text of the corpus, random tokens repeated once, and lists in and out of order. Text
comes from the profile's activations, the other two from the base model. After Jermyn et al., Progress on Attention
(2025), and the definitions in the modules that this one puts together; docs/meaning.md says what each figure means.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.cache import ActivationSource
from crosshead.activations.capture import capture
from crosshead.activations.survey import repeated_random_tokens
from crosshead.activations.texts import read_texts
from crosshead.analysis.cluster_meaning import describe_clusters
from crosshead.analysis.enrichment import EnrichmentConfig
from crosshead.analysis.examples import examples
from crosshead.analysis.feature_matches import match_features
from crosshead.analysis.labels import (
    Evidence,
    FeatureLabels,
    LabelConfig,
    domain_evidence,
    label_features,
    pair_evidence,
    source_evidence,
    succession_evidence,
)
from crosshead.analysis.moved import Moved, moved
from crosshead.analysis.movers import IDENTITY, Mover, mover_of
from crosshead.analysis.predictability import PredictabilityConfig, median_interval, observe, predictability
from crosshead.analysis.relations import POSITIONAL, RELATIONS, delimiters
from crosshead.analysis.succession import SuccessionTexts, queries_after_first_item, succession_texts
from crosshead.dictionaries.base import Batch, Dictionary, Site

__all__ = ["MeaningConfig", "Subject", "describe"]

Record = dict[str, Any]
Floats = NDArray[np.float64]
_CODE = "code"
_FEWEST = 10
_OF_SETTINGS = ("enrichment_summary", "modality")


class MeaningConfig(BaseModel):
    """Parameters of the meaning stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: Annotated[tuple[str, ...], Field(min_length=1)]
    """Training runs whose features are described."""
    settings: tuple[str, ...] = ()
    """Runs at other settings of training, described without examples and single clusters."""
    contexts: Annotated[int, Field(gt=0)] = 48
    """Held-out contexts of text, at most."""
    contexts_per_batch: Annotated[int, Field(gt=0)] = 4
    """Contexts read at a time."""
    sequences: Annotated[int, Field(gt=0)] = 16
    """Contexts of random tokens repeated once."""
    length: Annotated[int, Field(ge=4)] = 64
    """Random tokens before they repeat."""
    succession_windows: Annotated[int, Field(gt=0)] = 8
    """Ordered lists of every kind, each with a shuffled twin."""
    succession_items: Annotated[int, Field(ge=4, le=7)] = 6
    """Items of a list."""
    labels: LabelConfig = LabelConfig()
    """Thresholds of the labels."""
    predictability: PredictabilityConfig = PredictabilityConfig()
    """Sample and fit of the n-grams."""
    clusters: EnrichmentConfig = EnrichmentConfig()
    """The clustering that is looked into."""
    matched: tuple[tuple[str, str], ...] = ()
    """Pairs of these runs whose features are matched and shown side by side."""
    matched_cosine: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Least cosine of two features' activations in a matched pair."""
    matched_shown: Annotated[int, Field(ge=0)] = 8
    """Matched features shown of every pair of runs."""
    induction_head_score: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Heads with at least this induction score in the survey are its induction heads."""
    examples_per_label: Annotated[int, Field(ge=0)] = 3
    """Features shown per label."""
    texts_per_example: Annotated[int, Field(gt=0)] = 3
    """Snippets shown per feature."""
    simulations: Annotated[int, Field(gt=0)] = 200
    """Uniform samples behind the p-value of the dip."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes random tokens, lists, samples and nulls."""

    @model_validator(mode="after")
    def _each_once(self) -> "MeaningConfig":
        named = (*self.runs, *self.settings)
        for name in (name for name in named if named.count(name) > 1):
            raise ValueError(f"{name!r} stands twice under runs and settings; name every run once")
        return self


class Subject(NamedTuple):
    """A trained dictionary."""

    name: str
    module: Dictionary
    live: NDArray[np.bool_]
    """[F], features that fired in the evaluation."""


@dataclass(frozen=True)
class _Contexts:
    """What the features of all dictionaries are looked at on."""

    cache: ActivationSource
    model: LanguageModel
    config: MeaningConfig
    repeated: list[Batch]
    lists: list[Batch]
    texts: SuccessionTexts
    after_first_item: list[Bool[Tensor, "B T"]]

    @classmethod
    def of(cls, sites: Sequence[Site], cache: ActivationSource, model: LanguageModel, config: MeaningConfig):
        """Run the base model once for all dictionaries."""
        limit = model.context_limit
        if limit is not None and 1 + 2 * config.length > limit:
            raise ValueError(f"meaning.length={config.length} makes contexts of {1 + 2 * config.length} tokens, the "
                             f"model allows {limit}; lower it to {(limit - 1) // 2} at most")  # fmt: skip
        tokens = repeated_random_tokens(model, config.sequences, config.length, config.seed)
        repeated = [_captured(model, group, sites) for group in tokens.split(config.contexts_per_batch)]
        texts = succession_texts(config.succession_windows, config.succession_items, config.seed)
        whole = read_texts(model, texts.texts, sites)
        counted = queries_after_first_item(whole, texts.first_items, model.tokenizer)
        return cls(cache, model, config, repeated, [whole], texts, [counted])

    def read(self, split: str, n_contexts: int, sites: Sequence[Site]) -> Iterator[Batch]:
        """The first contexts of a split, which are a fair sample of it."""
        numbers = list(range(min(n_contexts, self.cache.n_contexts(split))))
        for first in range(0, len(numbers), self.config.contexts_per_batch):
            group = numbers[first : first + self.config.contexts_per_batch]
            yield self.cache.read(split, group, sites, device=self.model.device)

    def domains(self) -> list[str]:
        """The domain of every context of text."""
        return self.cache.domains("heldout")[: self.config.contexts]

    def delimiter(self, tokens: Tensor) -> Tensor:
        """Which tokens are delimiters."""
        return delimiters(tokens, self.model.tokenizer)


def _captured(model: LanguageModel, tokens: Tensor, sites: Sequence[Site]) -> Batch:
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    mask[:, 0] = False
    found = {site: tensor.float() for site, tensor in capture(model, tokens, sites).items()}
    return Batch(found, mask.to(model.device), tokens.to(model.device))


@dataclass
class _Study:
    """One dictionary and what it moves on every kind of context."""

    subject: Subject
    mover: Mover
    """As on text."""
    text: Moved
    repeated: Moved
    lists: Moved
    labels: FeatureLabels

    @property
    def on_text(self) -> NDArray[np.bool_]:
        """Live features that moved anything on text."""
        return self.subject.live & (self.text.mass.numpy() > 0)


def describe(
    subjects: Sequence[Subject],
    cache: ActivationSource,
    model: LanguageModel,
    survey: Sequence[Mapping[str, Any]],
    config: MeaningConfig,
) -> Record:
    """The content of meaning.json (docs/meaning.md has the schema). ``survey`` has one record per head.

    ValueError where the cache lacks a site that a dictionary's moves need, for an architecture without known moves,
    contexts longer than the model allows, or a pair to match that is not described.
    """
    described = {subject.name for subject in subjects} - set(config.settings)
    for run in (run for pair in config.matched for run in pair if run not in described):
        raise ValueError(f"meaning.matched names {run!r}, which is not under meaning.runs; add it there")
    weights = cache.weights()
    everywhere = {subject.name: mover_of(subject.module, weights) for subject in subjects}
    sites = tuple(dict.fromkeys(site for mover in everywhere.values() for site in mover.sites))
    contexts = _Contexts.of(sites, cache, model, config)
    result: Record = {"runs": {}, "settings": {}, "enrichment": [], "enrichment_summary": {}, "ov_dimensions": [],
                      "size_correlations": {}, "modality": {}, "matches": []}  # fmt: skip
    kept: dict[str, Moved] = {}
    for subject in subjects:
        on_text = mover_of(subject.module, weights, lambda layer: _has_pattern(cache, layer))
        study = _study(subject, everywhere[subject.name], on_text, contexts)
        brief = subject.name in config.settings
        features = _features(study, contexts, survey, 0 if brief else config.examples_per_label)
        if any(subject.name in pair for pair in config.matched):
            kept[subject.name] = study.text
        clusters = describe_clusters(
            subject.module, _loadings(subject.module, cache), subject.live, study.labels, study.text,
            _induction_share(study, config), config.clusters, simulations=config.simulations, seed=config.seed,
            brief=brief,
        )  # fmt: skip
        if brief:
            del features["examples"]
            result["settings"][subject.name] = features | {key: clusters.get(key) for key in _OF_SETTINGS}
            continue
        result["runs"][subject.name] = features
        for key, own in clusters.items():
            if isinstance(own, list):
                result[key] += [{"run": subject.name} | record for record in own]
            else:
                result[key][subject.name] = own
    result["matches"] = [match_features(
        (first, second), kept[first], kept[second], model.tokenizer, threshold=config.matched_cosine,
        n_shown=config.matched_shown, bootstraps=config.predictability.bootstraps, seed=config.seed,
    ) for first, second in config.matched]  # fmt: skip
    return result


def _has_pattern(cache: ActivationSource, layer: int) -> bool:
    return {Site(layer, "q"), Site(layer, "k")} <= set(cache.sites)


def _loadings(module: Dictionary, cache: ActivationSource) -> Floats | None:
    """[F, heads], per query head where key/value heads are shared; None for features without fixed heads."""
    per_query_head = getattr(module, "query_head_loadings", None)
    found = module.head_loadings() if per_query_head is None else per_query_head(cache.weights())
    return None if found is None else found.double().cpu().numpy()


def _induction_share(study: _Study, config: MeaningConfig) -> Floats:
    """On repeated random tokens [F]; NaN for features that hardly fire there."""
    enough = study.repeated.firings.numpy() >= config.labels.minimum_firings
    return np.where(enough, study.repeated.share("induction"), np.nan)


def _study(subject: Subject, everywhere: Mover, on_text: Mover, contexts: _Contexts) -> _Study:
    config = contexts.config
    common: Any = {"delimiter": contexts.delimiter, "draws": config.labels.draws, "seed": config.seed}
    text = moved(on_text, contexts.read("heldout", config.contexts, on_text.sites), **common)
    repeated = moved(everywhere, contexts.repeated, **common)
    lists = moved(everywhere, contexts.lists, destinations=contexts.after_first_item, **common)
    labels = label_features(_evidence(text, repeated, lists, contexts), subject.live, config.labels)
    return _Study(subject, on_text, text, repeated, lists, labels)


def _evidence(text: Moved, repeated: Moved, lists: Moved, contexts: _Contexts) -> dict[str, Evidence]:
    config, seed = contexts.config.labels, contexts.config.seed
    found = {name: pair_evidence(repeated, name, config) for name in POSITIONAL}
    if text.mover.anchored == "source":
        found["delimiter"] = source_evidence(text, contexts.delimiter(text.tokens).numpy(), config, seed)
    else:
        found["delimiter"] = pair_evidence(text, "delimiter", config)
    domains = contexts.domains()
    if _CODE in domains and len(set(domains)) > 1:
        found["code"] = domain_evidence(text, domains, _CODE, config, seed)
    found["succession"] = succession_evidence(lists, contexts.texts.families, config, seed)
    return found


# ---- features ----


def _features(study: _Study, contexts: _Contexts, survey: Sequence[Mapping[str, Any]], n_examples: int) -> Record:
    config, labels = contexts.config, study.labels
    counts: Record = labels.counts()
    for name, evidence in labels.evidence.items():
        if name in RELATIONS:
            found = study.text if name == "delimiter" else study.repeated
            counts[name]["pooled_share"] = found.pooled_share(name, study.subject.live)
        counts[name]["measured"] = int((evidence.enough & study.subject.live & np.isfinite(evidence.share)).sum())
    shown = [record for name in labels.evidence for record in examples(
        study.lists if name == "succession" else study.text, labels, name, contexts.model.tokenizer,
        n_features=n_examples, n_texts=config.texts_per_example)]  # fmt: skip
    return {
        "architecture": study.subject.module.config.kind,
        "n_live": int(study.subject.live.sum()),
        "n_tokens": {"text": _n_counted(study.text), "repeated": _n_counted(study.repeated),
                     "lists": int(sum(int(counted.sum()) for counted in contexts.after_first_item))},
        "labels": counts,
        "breadth": _breadth(study, config),
        "predictability": _predictability(study, contexts),
        "induction_heads": _induction_heads(study, survey, config),
        "examples": shown,
    }  # fmt: skip


def _n_counted(found: Moved) -> int:
    return int(found.mask.sum())


def _breadth(study: _Study, config: MeaningConfig) -> Record | None:
    values = study.text.breadth()[study.on_text]
    if not study.mover.moves_between_positions or not len(values):
        return None
    bootstraps = config.predictability.bootstraps
    return {"median": float(np.median(values)), "interval": median_interval(values, bootstraps, config.seed)}


def _predictability(study: _Study, contexts: _Contexts) -> Record:
    """``from``: where a feature is moved from; ``to``: where it is moved to, or fires when it reads the query side."""
    config, module = contexts.config, study.subject.module
    often = study.on_text & (study.text.firings.numpy() >= config.predictability.minimum_firings)
    drawn = np.random.default_rng(config.seed).permutation(np.flatnonzero(often))
    chosen = np.sort(drawn[: config.predictability.features]).tolist()
    result: Record = {"from": None, "to": None}
    if not chosen:
        return result
    sizes = {"train": config.predictability.fit_contexts, "heldout": config.contexts}
    fit, held = (observe(module, contexts.read(split, n, module.sites), chosen) for split, n in sizes.items())
    return result | {side: predictability(fit[side], held[side], config.predictability, config.seed) for side in fit}


def _induction_heads(study: _Study, survey: Sequence[Mapping[str, Any]], config: MeaningConfig) -> Record | None:
    """Through which heads the features labelled induction move their mass on text, against all live features."""
    if not study.mover.moves_between_positions:
        return None
    through = study.text.through.numpy()
    own = study.labels.of("induction") & study.on_text
    shares = _normalised(through[own].sum(0)) if own.any() else None
    expected = _normalised(through[study.on_text].sum(0))
    scores = {(record["layer"], record["head"]): float(record["induction"]) for record in survey}
    places = study.mover.movers
    heads = [m for m, place in enumerate(places) if scores.get(place, 0.0) >= config.induction_head_score]
    order = np.argsort(-shares, kind="stable")[:5].tolist() if shares is not None else []
    return {
        "n_features": int(own.sum()),
        "top_heads_by_induction_feature_mass": [
            _head(places[m]) | {"share": float(shares[m]), "expected_share": float(expected[m])} for m in order
        ] if shares is not None else [],
        "survey_heads": [_head(places[m]) | {"score": scores[places[m]]} for m in heads],
        "share_on_survey_heads": None if shares is None or not heads else float(shares[heads].sum()),
        "interval": _share_interval(through[own][:, heads].sum(1), through[own].sum(1), config) if heads else None,
        "expected_share": float(expected[heads].sum()) if heads else None,
    }  # fmt: skip


def _share_interval(part: Floats, whole: Floats, config: MeaningConfig) -> list[float] | None:
    """95% percentile bootstrap interval, over features, of the sum of parts over the sum of wholes.

    None of fewer than ten features: a resample of so few has too little to vary.
    """
    if len(part) < _FEWEST:
        return None
    shape = (config.predictability.bootstraps, len(part))
    draws = np.random.default_rng(config.seed).integers(len(part), size=shape)
    ratios = part[draws].sum(1) / np.maximum(whole[draws].sum(1), 1e-300)
    return [float(q) for q in np.quantile(ratios, (0.025, 0.975))]


def _normalised(values: Floats) -> Floats:
    return values / max(values.sum(), 1e-300)


def _head(place: tuple[int, int]) -> Record:
    layer, head = place
    return {"layer": None, "head": "identity"} if place == IDENTITY else {"layer": layer, "head": head}
