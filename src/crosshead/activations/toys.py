"""Two small transformers that have to spread what they do over heads, trained here and written as caches.

Shape legend: n contexts, T positions, V tokens, C answers, H heads, E head width, d = d_model.

Both have one layer of attention and nothing else: learned token and position vectors, H heads, an output map to C
answers that also reads the residual stream. Position 0 is the beginning-of-text token.

    skip_trigram   a ... b -> c(a, b): one source token a, then destination tokens b; c(a, .) is a permutation. The
                   value of a head knows a and not b, so trigrams with one source are incompatible within a head, and
                   there are more of them than heads (after the May 2023 update on attention head superposition).
    ov_coherent    a ... b ... r -> c({a, b}): two signal tokens, then read-off tokens r. What is copied from one signal
                   depends on the other, at a destination that knows neither (after the OV-coherent toy model that
                   followed it).
"""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding

from crosshead.activations.synthetic import SyntheticSplit, write_cache
from crosshead.dictionaries.base import LayerWeights, ModelDims, Site
from crosshead.io.files import fingerprint
from crosshead.maths.patterns import AttentionSpec, attention_patterns

__all__ = ["Toy", "ToyConfig", "ToyKind", "train_toy"]

ToyKind = Literal["skip_trigram", "ov_coherent"]
Count = Annotated[int, Field(gt=0)]


class ToyConfig(BaseModel):
    """Size and training of a toy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads: Count = 4
    """H, fewer than there are incompatible rules."""
    head_dim: Count = 8
    """E."""
    d_model: Count = 32
    """d."""
    sources: Annotated[int, Field(ge=2)] = 4
    """Source tokens, or signal tokens."""
    destinations: Annotated[int, Field(ge=2)] = 8
    """Destination tokens, and answers, of the skip-trigram task."""
    fillers: Count = 7
    """Tokens without meaning."""
    context_length: Annotated[int, Field(ge=8)] = 12
    """T."""
    steps: Count = 3000
    """Optimiser steps."""
    contexts_per_batch: Count = 256
    """Contexts of a step, drawn anew every time."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    """Adam's; it falls linearly to zero over the second half."""
    train_contexts: Count = 1024
    """Contexts of the cache."""
    heldout_contexts: Count = 256
    """Held-out contexts of the cache; loss and accuracy are measured on them."""


class Toy(NamedTuple):
    """A trained toy, as what a harvest of its only layer finds."""

    splits: dict[str, SyntheticSplit]
    dims: ModelDims
    weights: dict[int, LayerWeights]
    specs: dict[int, AttentionSpec]
    loss: float
    """Held-out cross-entropy over the positions with an answer, nats."""
    accuracy: float
    """Share of right answers there."""
    description: dict
    """Task, seed and sizes."""

    def write(self, directory: Path | str) -> None:
        """Write the cache to ``directory``."""
        write_cache(directory, self.splits, dims=self.dims, weights=self.weights, specs=self.specs,
                    description=self.description)  # fmt: skip


def train_toy(kind: ToyKind, seed: int, config: ToyConfig | None = None) -> Toy:
    """Train a toy from scratch. The same seed gives the same toy on the same machine and number of threads."""
    config = config or ToyConfig()
    task = _Task.of(kind, config, _generator(kind, seed, "task"))
    model = _Model(config, task.n_tokens, task.n_answers, _generator(kind, seed, "start"))
    optimiser = torch.optim.Adam(model.parameters, lr=config.learning_rate)
    stream = _generator(kind, seed, "contexts")
    for step in range(config.steps):
        optimiser.param_groups[0]["lr"] = config.learning_rate * min(1.0, 2 - 2 * step / config.steps)
        tokens, answers = task.draw(config.contexts_per_batch, stream)
        loss = cross_entropy(model.logits(tokens)[answers >= 0], answers[answers >= 0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    sizes = {"train": config.train_contexts, "heldout": config.heldout_contexts}
    contexts = {name: task.draw(size, _generator(kind, seed, name)) for name, size in sizes.items()}
    tokens, answers = contexts["heldout"]
    with torch.no_grad():
        logits, wanted = model.logits(tokens)[answers >= 0], answers[answers >= 0]
        splits = {name: SyntheticSplit(drawn, [kind] * len(drawn), model.sites(drawn))
                  for name, (drawn, _) in contexts.items()}  # fmt: skip
    return Toy(
        splits, model.dims, {0: model.output_map()}, {0: model.spec},
        loss=float(cross_entropy(logits, wanted)), accuracy=float((logits.argmax(-1) == wanted).double().mean()),
        description={"toy": kind, "seed": seed, "config": config.model_dump(mode="json")},
    )  # fmt: skip


class _Task(NamedTuple):
    """Contexts and their answers. Tokens: 0, then sources, destinations or the read-off token, fillers."""

    kind: ToyKind
    config: ToyConfig
    table: Int[Tensor, "source other"]
    """c(a, b): the other is a destination, or the second signal."""

    @classmethod
    def of(cls, kind: ToyKind, config: ToyConfig, generator: torch.Generator) -> "_Task":
        if kind == "skip_trigram":
            rows = [torch.randperm(config.destinations, generator=generator) for _ in range(config.sources)]
            return cls(kind, config, torch.stack(rows))
        upper = torch.ones(config.sources, config.sources).triu().nonzero()
        table = torch.zeros(config.sources, config.sources, dtype=torch.long)
        table[upper[:, 0], upper[:, 1]] = torch.randperm(len(upper), generator=generator)
        return cls(kind, config, torch.maximum(table, table.T))

    @property
    def n_ends(self) -> int:
        """Tokens that have an answer."""
        return self.config.destinations if self.kind == "skip_trigram" else 1

    @property
    def n_tokens(self) -> int:
        return 1 + self.config.sources + self.n_ends + self.config.fillers

    @property
    def n_answers(self) -> int:
        return int(self.table.max()) + 1

    def draw(self, n: int, generator: torch.Generator) -> tuple[Int[Tensor, "n T"], Int[Tensor, "n T"]]:
        """Contexts, and the answer at every position, -1 where there is none."""
        config, half = self.config, self.config.context_length // 2
        first_end, first_filler = 1 + config.sources, 1 + config.sources + self.n_ends
        tokens = torch.randint(first_filler, self.n_tokens, (n, config.context_length), generator=generator)
        tokens[:, 0] = 0
        ends = torch.randint(self.n_ends, (n, config.context_length - half), generator=generator)
        tokens[:, half:] = first_end + ends
        places = torch.rand(n, half - 1, generator=generator).argsort(1) + 1
        sources = torch.randint(config.sources, (n, 2), generator=generator)
        tokens.scatter_(1, places[:, :1], 1 + sources[:, :1])
        other = ends
        if self.kind == "ov_coherent":
            tokens.scatter_(1, places[:, 1:2], 1 + sources[:, 1:])
            other = sources[:, 1:].expand_as(ends)
        answers = torch.full_like(tokens, -1)
        answers[:, half:] = self.table[sources[:, :1], other]
        return tokens, answers


class _Model:
    """One layer of attention between an embedding and an output map."""

    def __init__(self, config: ToyConfig, n_tokens: int, n_answers: int, generator: torch.Generator):
        d, heads, width = config.d_model, config.heads, config.head_dim
        self.dims = ModelDims(d_model=d, n_heads=heads, n_kv_heads=heads, head_dim=width, n_layers=1)
        self.spec = AttentionSpec(n_heads=heads, n_kv_heads=heads, head_dim=width, scale=width**-0.5)
        shapes = {"token": (n_tokens, d), "place": (config.context_length, d), "q": (heads, d, width),
                  "k": (heads, d, width), "v": (heads, d, width), "out": (heads, width, d),
                  "answer": (d, n_answers)}  # fmt: skip
        sizes = {name: shape[-2] ** -0.5 for name, shape in shapes.items()} | {"token": 1.0, "place": 0.3}
        self.tables = {name: (torch.randn(shape, generator=generator) * sizes[name]).requires_grad_()
                       for name, shape in shapes.items()}  # fmt: skip

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.tables.values())

    def sites(self, tokens: Int[Tensor, "n T"]) -> dict[Site, Tensor]:
        """What a harvest of layer 0 finds."""
        tables = self.tables
        # Plain indexing adds its gradients from several threads in whatever order they come.
        resid = embedding(tokens, tables["token"]) + tables["place"]
        q, k, v = (torch.einsum("ntd,hde->nhte", resid, tables[name]) for name in ("q", "k", "v"))
        z = attention_patterns(q, k, self.spec) @ v
        out = torch.einsum("nhte,hed->ntd", z, tables["out"])
        named = {"resid_in": resid, "q": q, "k": k, "v": v, "attn_out": out}
        return {Site(0, name): x for name, x in named.items()}  # pyright: ignore[reportArgumentType]

    def logits(self, tokens: Int[Tensor, "n T"]) -> Float[Tensor, "n T C"]:
        found = self.sites(tokens)
        return (found[Site(0, "resid_in")] + found[Site(0, "attn_out")]) @ self.tables["answer"]

    def output_map(self) -> LayerWeights:
        return LayerWeights(self.tables["out"].detach(), torch.zeros(self.dims.d_model))


def _generator(kind: str, seed: int, part: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(fingerprint([kind, seed, part]), 16) % 2**63)
