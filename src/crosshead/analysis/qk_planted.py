"""Layers whose QK features are known: queries and keys made of them, and what training recovers.

Shape legend: B contexts, T positions, E head width, F planted features.

    q_t = sum_i u_i(t) a_i + noise,    k_s = sum_i v_i(s) b_i + noise

u and v are sparse and positive. Without rotation a_i are orthonormal and b_i = a_i or, for every other feature, -a_i:
scores are sum_i +-u_i(t) v_i(s). With rotation every feature has a frequency's plane of its own, a_i and b_i are turned
against one another in it, and scores are sum_i u_i(t) v_i(s) cos(w_i (t - s) + phi_i): planes do not mix under rotation
(design choice).

A planted feature counts as recovered when one learned feature correlates with its u and with its v, each by at least
0.9, on contexts not trained on.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from crosshead.analysis.evaluation import EvaluationConfig
from crosshead.analysis.qk_metrics import evaluate
from crosshead.attention.qk_diagonal import Config, Module
from crosshead.dictionaries.base import Batch, ModelDims, Site
from crosshead.maths.patterns import AttentionSpec
from crosshead.training.fit import TrainingConfig, fit

__all__ = ["PlantedQK", "PlantedQKConfig", "planted_trial", "recovered_share"]

_CORRELATION = 0.9
_SITES = (Site(0, "q"), Site(0, "k"))


class PlantedQKConfig(BaseModel):
    """What is planted and how the model is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: Annotated[int, Field(gt=0)] = 12
    """Planted features; the model gets twice as many."""
    active: Annotated[int, Field(gt=0)] = 3
    """Mean number of planted features active at a position, on each side."""
    length: Annotated[int, Field(gt=1)] = 48
    """Positions of a context."""
    contexts: Annotated[int, Field(gt=0)] = 256
    """Training contexts; a quarter as many are held out."""
    noise: Annotated[float, Field(ge=0)] = 0.02
    """Standard deviation of every coordinate's noise."""
    position: Literal["content", "rotary"] = "content"
    """Whether queries and keys are rotated."""
    steps: Annotated[int, Field(gt=0)] = 1_000
    """Training steps."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes the layer and the training."""


@dataclass
class PlantedQK:
    """A source of batches that knows its features; the interface that ``fit`` asks for."""

    q: Float[Tensor, "n 1 T E"]
    k: Float[Tensor, "n 1 T E"]
    u: Float[Tensor, "n T F"]
    v: Float[Tensor, "n T F"]
    size: int = 4

    @classmethod
    def draw(
        cls, config: PlantedQKConfig, n_contexts: int, tables: tuple[Tensor, Tensor] | None, seed: int
    ) -> "PlantedQK":
        """Contexts of a layer; the same features for every ``seed`` of contexts."""
        generator = torch.Generator().manual_seed(seed)
        own = torch.Generator().manual_seed(config.seed)
        n_features, width = config.features, 2 * config.features
        shape = (n_contexts, config.length, n_features)
        u, v = (_activations(shape, config.active / n_features, generator) for _ in range(2))
        if tables is None:
            a = torch.linalg.qr(torch.randn(width, n_features, generator=own))[0].T
            b = a * torch.where(torch.arange(n_features) % 2 == 1, -1.0, 1.0)[:, None]
        else:
            # Coordinate i pairs with i + F: one plane per feature.
            angle = torch.rand(2, n_features, generator=own) * 2 * torch.pi
            a, b = (torch.cat([torch.diag(x.cos()), torch.diag(x.sin())], dim=1) for x in angle)
        both = []
        for activations, vectors in ((u, a), (v, b)):
            x = activations @ vectors
            x = (x + config.noise * torch.randn(x.shape, generator=generator))[:, None]
            both.append(x if tables is None else _rotated(x, *tables))
        return cls(both[0], both[1], u, v)

    def batch(self, contexts: Sequence[int]) -> Batch:
        """The given contexts; position 0 does not count."""
        chosen = torch.as_tensor(contexts)
        mask = torch.ones(len(chosen), self.q.shape[2], dtype=torch.bool)
        mask[:, 0] = False
        sites = dict(zip(_SITES, (self.q[chosen], self.k[chosen]), strict=True))
        return Batch(sites, mask, torch.zeros(mask.shape, dtype=torch.long))

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        first = step * self.size
        return self.batch([(first + i) % len(self.q) for i in range(self.size)])

    def sample(self, n_contexts: int, seed: int) -> list[Batch]:
        """Some contexts, in batches."""
        drawn = torch.randperm(len(self.q), generator=torch.Generator().manual_seed(seed)).tolist()[:n_contexts]
        return [self.batch(drawn[i : i + self.size]) for i in range(0, len(drawn), self.size)]


def _activations(shape: tuple[int, ...], density: float, generator: torch.Generator) -> Tensor:
    on = torch.rand(shape, generator=generator) < density
    return on * (1.0 + torch.rand(shape, generator=generator))


def _tables(config: PlantedQKConfig) -> tuple[Tensor, Tensor] | None:
    if config.position == "content":
        return None
    frequencies = 1.0 / 50.0 ** (torch.arange(config.features) / config.features)
    angle = torch.arange(config.length)[:, None] * frequencies
    return tuple(torch.cat([x, x], dim=1) for x in (angle.cos(), angle.sin()))  # pyright: ignore[reportReturnType]


def _rotated(x: Float[Tensor, "n 1 T E"], cos: Tensor, sin: Tensor) -> Float[Tensor, "n 1 T E"]:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


@torch.no_grad()
def recovered_share(module: Module, source: PlantedQK) -> tuple[float, float]:
    """Share of planted features that are recovered, and the mean correlation of the best matches (the worse side's)."""
    batch = source.batch(range(len(source.q)))
    sides, rows = module.sides(batch), batch.mask.flatten()
    worse = None
    for codes, truth in ((sides.query.codes, source.u), (sides.key.codes, source.v)):
        both = codes.to_dense()[rows].double(), truth.flatten(0, 1)[rows].double()
        learned, planted = ((x - x.mean(0)) / x.std(0).clamp(min=1e-9) for x in both)
        correlation = planted.T @ learned / len(learned)
        worse = correlation if worse is None else torch.minimum(worse, correlation)
    assert worse is not None
    best = worse.amax(1)
    return float((best >= _CORRELATION).double().mean()), float(best.mean())


def planted_trial(config: PlantedQKConfig) -> dict[str, Any]:
    """Train on a planted layer: ``{position, features, share_recovered, correlation, normalised_mse, l0, l0_true}``."""
    tables = _tables(config)
    train = PlantedQK.draw(config, config.contexts, tables, config.seed * 2 + 1)
    heldout = PlantedQK.draw(config, max(config.contexts // 4, 1), tables, config.seed * 2 + 2)
    width = 2 * config.features
    dims = ModelDims(d_model=width, n_heads=1, n_kv_heads=1, head_dim=width, n_layers=1)
    parameters = {"layers": [0], "features": 2 * config.features, "target": "scores", "position": config.position,
                  "sparsity": {"kind": "batch_topk", "k": config.active}}  # fmt: skip
    module = Module(Config.model_validate(parameters), dims)
    module.use_attention_(
        AttentionSpec(n_heads=1, n_kv_heads=1, head_dim=width, scale=1.0, rotary=None if tables is None else "planted"),
        tables,
    )
    schedule = TrainingConfig(steps=config.steps, contexts_per_batch=train.size, checkpoint_every=config.steps,
                              evaluate_every=config.steps, start_contexts=16, calibrate_contexts=32)  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        fit(module, train, heldout, {}, schedule, seed=config.seed, work=Path(work), identity="planted",
            description=f"planted QK, {config.position}")  # fmt: skip
    share, correlation = recovered_share(module, heldout)
    measured = evaluate(module, heldout.sample(len(heldout.q), 0), EvaluationConfig())
    on = [(x[:, 1:] > 0).double() for x in (heldout.u, heldout.v)]
    l0_true = float(on[0].flatten(0, 1).mean(0) @ on[1].flatten(0, 1).mean(0))
    return {
        "position": config.position,
        "features": config.features,
        "seed": config.seed,
        "share_recovered": share,
        "correlation": correlation,
        "normalised_mse": measured.normalised_mse,
        "l0": measured.l0,
        "l0_true": l0_true,
    }
