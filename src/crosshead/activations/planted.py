r"""Attention layers whose features are known: the ground truth that every claim is tried on.

Shape legend: n contexts, T positions, H heads, M = H + 1 movers (index 0 is the identity), W width of queries and keys,
E head width, d = d_model, A atoms, layer one or two planted layers.

Queries and keys are drawn first (``planted_heads``), so the patterns A_h exist before any feature does. Atoms fire
sparsely at every position but the first, a_i(s) >= 0; with encoder direction w_i, decoder d_i and loadings L_i

    x_s = sum_i a_i(s) w_i + noise                                               residual stream
    c_h(s) = sum_i L_hi a_i(s) d_i                                               what head h moves
    v_h(s) = c_h(s) U_h + noise, W_O^h = U_h', U_h U_h' = 1                      value
    y_t = sum_h sum_s A_h(t,s) c_h(s) + c_0(t) + sum_h A_h(t,0) b_h + noise      attention output

so that at noise 0 the output is exact by construction. A feature of OV dimension r is r atoms with one loading vector,
of which one fires at a time; r = 1 unless ``ov_dimensions`` says otherwise. Loadings come in families: members lie
around a centre, which is one mover at ``mixing`` 0 and a random unit vector over all movers at 1. Decoders are scaled
so that every atom writes equally much when it fires, whatever its heads attend to (design choice, after the
January 2024 update on attention superposition).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from crosshead.activations.planted_heads import HeadKind, PlantedHeads, code_width, draw_pairs, draw_tokens
from crosshead.activations.synthetic import SyntheticSplit, write_cache
from crosshead.dictionaries.base import LayerWeights, ModelDims, Site
from crosshead.io.files import atomic_directory, fingerprint, read_json, write_json
from crosshead.io.tensors import load_tensors, save_tensors
from crosshead.maths.statistics import participation_ratio

__all__ = ["PlantedConfig", "Truth", "plant"]

Count = Annotated[int, Field(gt=0)]


class PlantedConfig(BaseModel):
    """What is planted. The defaults are an easy layer: heads of distinct kinds, every feature on one of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: Annotated[int, Field(ge=0)] = 0
    """Of every random choice."""
    train_contexts: Count = 2048
    """Training contexts. Heads look at few places, so features need many positions."""
    heldout_contexts: Count = 256
    """Held-out contexts."""
    context_length: Annotated[int, Field(ge=12)] = 32
    """T, the beginning-of-text token included."""
    vocabulary: Annotated[int, Field(ge=6)] = 24
    """Tokens, the beginning-of-text token included."""
    delimiters: Count = 6
    """Tokens that delimiter heads look for."""
    repeats: Annotated[int, Field(ge=0)] = 2
    """Segments that occur twice in a context."""
    heads: Annotated[tuple[HeadKind, ...], Field(min_length=1)] = (
        "previous_token", "induction", "duplicate_token", "delimiter", "skip_trigram", "local",
    )  # fmt: skip
    """Kind of every head. Two of one kind attend alike: their loadings cannot be told apart."""
    sharpness: Annotated[float, Field(gt=0)] = 8.0
    """Score of a place that a head looks for."""
    sink: float = 4.0
    """Score of the beginning-of-text token."""
    d_model: Count = 56
    """Width of the residual stream."""
    features: Count = 64
    """Features of all layers together."""
    ov_dimensions: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    """Atoms per feature, family by family in turn."""
    l0: Annotated[float, Field(gt=0)] = 4.0
    """Mean active features per position."""
    rarity: Annotated[float, Field(ge=0)] = 0.5
    """Firing probabilities fall as rank ** -rarity."""
    spread: Annotated[float, Field(ge=0)] = 0.4
    """Standard deviation of the logarithm of activations; their mean is 1."""
    families: Count = 7
    """Families of loadings; those of one mover begin with the heads, in order, the identity comes last."""
    mixing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """0: every feature on one mover; 1: spread over all of them, signs free."""
    jitter: Annotated[float, Field(ge=0)] = 0.2
    """Distance of a member from its family's centre, times ``mixing``."""
    layers: Literal[1, 2] = 1
    """Layers 0 and 1 of a model read the same features."""
    shared: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of features that both of two layers move; the others belong to one layer each, in turn."""
    noise: Annotated[float, Field(ge=0)] = 0.1
    """Rms of the Gaussian noise on residual stream, values and outputs over that of their signal."""
    sites: tuple[Literal["resid_in", "q", "k", "v", "attn_out"], ...] = ("resid_in", "q", "k", "v", "attn_out")
    """What is stored of every layer."""

    @model_validator(mode="after")
    def _fits(self) -> "PlantedConfig":
        if self.delimiters > self.vocabulary - 3:
            raise ValueError(f"{self.delimiters} delimiters leave too few of {self.vocabulary} tokens; "
                             "lower delimiters or raise vocabulary")  # fmt: skip
        if self.l0 > self.features / 4:
            raise ValueError(f"l0={self.l0} of {self.features} features is not sparse; lower l0 or raise features")
        if self.families > self.features:
            raise ValueError(f"{self.families} families need as many features, got {self.features}; lower families")
        return self

    @property
    def dims(self) -> ModelDims:
        """Widths of the planted model; heads are wide enough for codes and for exact output maps."""
        n_heads = len(self.heads)
        width = max(self.d_model, code_width(self.vocabulary, self.context_length))
        return ModelDims(
            d_model=self.d_model, n_heads=n_heads, n_kv_heads=n_heads, head_dim=width, n_layers=self.layers
        )


@dataclass(frozen=True)
class Truth:
    """What was planted, atom by atom."""

    encoder: Float[Tensor, "A d"]
    """Unit directions in the residual stream."""
    decoder: Float[Tensor, "layer A d"]
    """What one unit of activation writes through a loading of 1."""
    loadings: Float[Tensor, "layer M A"]
    """Unit vectors over movers where the atom is moved in that layer, zero elsewhere."""
    feature: Int[Tensor, " A"]
    """The feature an atom belongs to; its atoms are its OV dimensions."""
    family: Int[Tensor, " A"]
    """The family of its loadings."""
    active: Bool[Tensor, "layer A"]
    """The layers that move it."""
    probability: Float[Tensor, " A"]
    """Share of counted positions at which it fires."""
    config: PlantedConfig

    def save(self, directory: Path | str) -> None:
        """Write truth.safetensors and truth.json into a directory."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        save_tensors(Path(directory) / "truth.safetensors", tensors)
        write_json(Path(directory) / "truth.json", self.config.model_dump(mode="json"))

    @classmethod
    def load(cls, directory: Path | str) -> "Truth":
        """Read what ``save`` wrote. ValueError when it is missing or damaged."""
        config = PlantedConfig.model_validate(read_json(Path(directory) / "truth.json"))
        return cls(**load_tensors(Path(directory) / "truth.safetensors", "plant it again"), config=config)


def plant(config: PlantedConfig, directory: Path | str) -> Truth:
    """Write ``cache`` (for ``ActivationCache.open``), the truth and planted.json to ``directory``, whole or not at all.

    planted.json holds ``pattern_gram`` and its ``condition_number`` (movers scaled to a unit diagonal, key of the
    beginning-of-text token left out), per head kind the ``semantic`` pattern's least-squares ``weights`` over the
    movers and the ``residual`` share of its squares, ``l0``, and ``movers_per_atom``, a mean participation ratio.
    """
    pairs = draw_pairs(config.vocabulary, _generator(config, "pairs"))
    tokens = draw_tokens(config.train_contexts + config.heldout_contexts, config.context_length, config.vocabulary,
                         config.repeats, _generator(config, "tokens"))  # fmt: skip
    heads = PlantedHeads.of(config.heads, tokens, pairs, delimiters=config.delimiters, sharpness=config.sharpness,
                            sink=config.sink, width=config.dims.head_dim)  # fmt: skip
    gram = heads.gram()
    truth = _draw_truth(config, gram)
    values = _activations(config, truth, len(tokens))
    sites: dict[Site, Tensor] = {}
    weights: dict[int, LayerWeights] = {}
    for layer in range(config.layers):
        found, weights[layer] = _plant_layer(config, truth, heads, values, layer)
        sites |= {Site(layer, name): found[name] for name in config.sites}
    bounds = {"train": slice(0, config.train_contexts), "heldout": slice(config.train_contexts, len(tokens))}
    splits = {
        name: SyntheticSplit(tokens[rows], ["planted"] * len(tokens[rows]), {s: x[rows] for s, x in sites.items()})
        for name, rows in bounds.items()
    }
    with atomic_directory(directory) as target:
        write_cache(target / "cache", splits, dims=config.dims, weights=weights,
                    specs=dict.fromkeys(range(config.layers), heads.spec),
                    description={"planted": config.model_dump(mode="json")})  # fmt: skip
        truth.save(target)
        write_json(target / "planted.json", _describe(config, truth, heads, gram))
    return truth


def _draw_truth(config: PlantedConfig, gram: Float[Tensor, "M M"]) -> Truth:
    """Directions, loadings and firing probabilities. ``gram``: mean over counted positions of the movers' products."""
    generator = _generator(config, "features")
    family_of_feature = torch.arange(config.features) % config.families
    dimensions = torch.tensor([config.ov_dimensions[int(f) % len(config.ov_dimensions)] for f in family_of_feature])
    feature = torch.arange(config.features).repeat_interleave(dimensions)
    family = family_of_feature[feature]

    rank = torch.randperm(config.features, generator=generator) + 1
    chance = rank.float() ** -config.rarity
    chance = (config.l0 * chance / chance.sum()).clamp(max=0.5)
    n_atoms = len(feature)
    encoder = _apart(torch.randn(n_atoms, config.d_model, generator=generator))
    active = torch.ones(config.layers, config.features, dtype=torch.bool)
    if config.layers == 2:
        order = torch.randperm(config.features, generator=generator)
        own = order[round(config.shared * config.features) :]
        active[1, own[0::2]] = False
        active[0, own[1::2]] = False
    active = active[:, feature]

    decoders, loadings = [], []
    for layer in range(config.layers):
        of_feature = _draw_loadings(config, family_of_feature, len(gram), generator)
        loading = of_feature[:, feature] * active[layer]
        written = (loading * (gram @ loading)).sum(0).clamp(min=1e-6).rsqrt() * active[layer]
        decoder = _apart(torch.randn(n_atoms, config.d_model, generator=generator))
        decoders.append(decoder * written[:, None])
        loadings.append(loading)
    return Truth(encoder, torch.stack(decoders), torch.stack(loadings), feature, family, active,
                 (chance / dimensions)[feature], config)  # fmt: skip


def _draw_loadings(
    config: PlantedConfig, family: Int[Tensor, " feature"], movers: int, generator: torch.Generator
) -> Float[Tensor, "M feature"]:
    """Unit loadings around their families' centres."""
    single = torch.eye(movers)[(torch.arange(config.families) + 1) % movers]
    spread = normalize(torch.randn(config.families, movers, generator=generator), dim=1)
    centre = normalize((1 - config.mixing) * single + config.mixing * spread, dim=1)[family]
    noise = normalize(torch.randn(len(family), movers, generator=generator), dim=1)
    return normalize(centre + config.mixing * config.jitter * noise, dim=1).T


def _apart(directions: Float[Tensor, "A d"], steps: int = 100) -> Float[Tensor, "A d"]:
    """Unit directions, orthogonal where there are dimensions enough, else a nearly tight frame of small overlaps.

    In a tight frame the best linear reading of a direction is along it, so an encoder has one right answer.
    """
    directions = normalize(directions, dim=1)
    for _ in range(steps):
        overlap = directions @ directions.T
        overlap.fill_diagonal_(0.0)
        directions = normalize(directions - 0.5 * overlap**3 @ directions, dim=1)
        U, _sizes, V = torch.linalg.svd(directions, full_matrices=False)
        directions = normalize(U @ V, dim=1)
    return directions


def _activations(config: PlantedConfig, truth: Truth, n_contexts: int) -> Float[Tensor, "n T A"]:
    """a_i(s): features fire on their own, a feature with several atoms through one of them; none at position 0."""
    generator = _generator(config, "activations")
    shape = (n_contexts, config.context_length)
    n_atoms = torch.bincount(truth.feature)
    chance = torch.zeros(config.features).index_add_(0, truth.feature, truth.probability)
    fires = torch.rand(*shape, config.features, generator=generator) < chance
    fires[:, 0] = False
    which = (torch.rand(*shape, config.features, generator=generator) * n_atoms).long()
    place = torch.arange(len(truth.feature)) - (n_atoms.cumsum(0) - n_atoms)[truth.feature]
    size = torch.randn(*shape, config.features, generator=generator) * config.spread - config.spread**2 / 2
    of_feature = fires * size.exp()
    return of_feature[..., truth.feature] * (which[..., truth.feature] == place)


def _plant_layer(
    config: PlantedConfig, truth: Truth, heads: PlantedHeads, activations: Float[Tensor, "n T A"], layer: int
) -> tuple[dict[str, Tensor], LayerWeights]:
    """Every site of a layer by name, and its output map."""
    generator = _generator(config, f"layer {layer}")
    dims = config.dims
    n_contexts, length = activations.shape[:2]
    square = torch.randn(dims.n_heads, dims.head_dim, dims.head_dim, generator=generator)
    to_value = torch.linalg.qr(square).Q[:, : dims.d_model]
    first = torch.randn(dims.n_heads, dims.d_model, generator=generator)
    loadings, decoder = truth.loadings[layer], truth.decoder[layer]

    out = (activations * loadings[0]) @ decoder
    v = torch.empty(n_contexts, dims.n_heads, length, dims.head_dim)
    for h in range(dims.n_heads):
        moved = (activations * loadings[h + 1]) @ decoder
        moved[:, 0] = first[h]
        out += heads.patterns[:, h] @ moved
        v[:, h] = moved @ to_value[h]
    resid = activations @ truth.encoder
    resid[:, 0] = 4.0 * torch.randn(dims.d_model, generator=generator)
    by_position = {"resid_in": resid, "v": v, "attn_out": out}
    for x in by_position.values():
        counted = x[..., 1:, :]
        signal = (counted - counted.mean((0, -2), keepdim=True)).square().mean().sqrt()
        counted += config.noise * signal * torch.randn(counted.shape, generator=generator)
    weights = LayerWeights(to_value.transpose(1, 2).contiguous(), torch.zeros(dims.d_model))
    return {"q": heads.q, "k": heads.k, **by_position}, weights


def _describe(config: PlantedConfig, truth: Truth, heads: PlantedHeads, gram: Float[Tensor, "M M"]) -> dict[str, Any]:
    scale = gram.diagonal().double().rsqrt()
    unit = gram.double() * scale[:, None] * scale
    eigenvalues = torch.linalg.eigvalsh(unit)
    movers = participation_ratio(truth.loadings.square().transpose(0, 1).flatten(1))
    return {
        "config": config.model_dump(mode="json"),
        "atoms": len(truth.feature),
        "l0": float(truth.probability.sum()),
        "pattern_gram": unit.tolist(),
        "condition_number": float(eigenvalues[-1] / eigenvalues[0].clamp(min=1e-12)),
        "semantic": heads.semantic(),
        "movers_per_atom": float(movers[truth.active.flatten()].mean()),
    }


def _generator(config: PlantedConfig, part: str) -> torch.Generator:
    """A stream of its own for every part, so that a change of one leaves the others alone."""
    return torch.Generator().manual_seed(int(fingerprint({"seed": config.seed, "part": part}), 16) % 2**63)
