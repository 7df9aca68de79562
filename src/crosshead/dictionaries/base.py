"""The contract every dictionary keeps: what it reads, what it returns, how it is saved.

Shape legend: B contexts, T positions, N = B*T rows (row-major: row = context * T + position), F features,
H query heads, K key/value heads, E head width, D the width of the dictionary's target.

A training step is ``loss = module.loss(batch, progress); loss.total.backward(); optimiser.step(); module.project_()``.
``progress`` runs from 0 to 1 over training and drives annealing, so a step depends on nothing that is not an argument.
Methods that change state end in an underscore.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from crosshead.io.files import atomic_directory, read_json, write_json
from crosshead.io.settings import parse_section
from crosshead.io.tensors import load_tensors, save_tensors
from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine

__all__ = [
    "Batch",
    "Dictionary",
    "DictionaryConfig",
    "LayerWeights",
    "Loss",
    "ModelDims",
    "ParameterGroup",
    "Site",
    "Trainable",
    "read_description",
]

_FORMAT = 1
SiteName = Literal["q", "k", "v", "v_shared_input", "pattern", "resid_in", "attn_out", "mlp_in", "mlp_out", "resid_out"]


class Site(NamedTuple):
    """A named tensor of one layer of the base model.

    q [B,H,T,E] and k [B,K,T,E] after rotary embedding and norms, v [B,K,T,E], pattern [B,H,T,T] (recomputed from
    q and k), resid_in and resid_out (residual stream before and after the layer), attn_out (what the attention block
    adds to the residual stream, before any post-norm scale is folded elsewhere), mlp_in and mlp_out: all [B,T,d_model].
    v_shared_input [B,K,T,E] is no place in the model: the v that this layer's own norm and value map make of the
    residual input of another, the lowest layer of the harvest (a control of two-layer value SAEs).
    """

    layer: int
    name: SiteName

    def __str__(self) -> str:
        return f"{self.layer}.{self.name}"


class ModelDims(BaseModel):
    """The widths of the base model that fix a dictionary's shapes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    d_model: Annotated[int, Field(gt=0)]
    n_heads: Annotated[int, Field(gt=0)]
    n_kv_heads: Annotated[int, Field(gt=0)]
    head_dim: Annotated[int, Field(gt=0)]
    n_layers: Annotated[int, Field(gt=0)]


class LayerWeights(NamedTuple):
    """The frozen output map of one attention layer: z_h W_O^h summed over heads, plus the bias, is attn_out."""

    W_O: Float[Tensor, "H E d_model"]
    b_O: Float[Tensor, " d_model"]


@dataclass(frozen=True)
class Batch:
    """Whole contexts of activations.

    ``sites`` maps a Site to its tensor (shapes: see Site); ``mask`` is True where a position counts: never padding,
    never the beginning-of-text token, which stands at position 0 of every context.
    """

    sites: Mapping[Site, Tensor]
    mask: Bool[Tensor, "B T"]
    tokens: Int[Tensor, "B T"]

    def __getitem__(self, site: Site) -> Tensor:
        try:
            return self.sites[site]
        except KeyError:
            have = ", ".join(map(str, self.sites))
            raise ValueError(f"the batch has no site {site}; it holds {have}; add it to harvest.sites") from None

    @property
    def n_counted(self) -> int:
        """Number of positions that count."""
        return int(self.mask.sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Move every tensor to a device."""
        sites = {site: tensor.to(device) for site, tensor in self.sites.items()}
        return Batch(sites, self.mask.to(device), self.tokens.to(device))


class Loss(NamedTuple):
    """Named parts whose sum is minimised, and what the trainer logs beside them."""

    parts: dict[str, Tensor]
    """Scalars with gradient; the loss is their sum. ``reconstruction`` is always among them."""
    l0: float
    """Mean number of active features per counted position."""
    normalised_mse: float
    """Of this batch: squared error over the summed squares of the centred target."""
    fired: Bool[Tensor, " F"]
    """Which features were active anywhere in the batch."""

    @property
    def total(self) -> Tensor:
        """The sum of the parts."""
        return torch.stack(list(self.parts.values())).sum()

    @classmethod
    def of(cls, parts: dict[str, Tensor], codes: SparseCodes, error: Tensor, target: Float[Tensor, "n D"]) -> "Loss":
        """The loss of parts, the codes they come from, the summed squared error and the counted rows of the target."""
        active = int((codes.values.detach() != 0).sum())
        return cls(parts, active / len(target), float(error.detach() / target.square().sum()), codes.fired())


class ParameterGroup(NamedTuple):
    """Parameters that share a learning rate: the run's own times ``multiplier``."""

    name: str
    parameters: list[nn.Parameter]
    multiplier: float


class DictionaryConfig(BaseModel):
    """Fields every dictionary has. Each architecture adds its own and fixes ``kind``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """Architecture: the name of its file in crosshead/dictionaries."""
    layers: Annotated[tuple[int, ...], Field(min_length=1)]
    """Base-model layers it reads, lowest first."""
    features: Annotated[int, Field(gt=0)]
    """F, the number of dictionary features."""

    @field_validator("layers")
    @classmethod
    def _layers_ascend(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        """A validator, not a constraint of the field: architectures that narrow ``layers`` inherit it."""
        if layers and (layers[0] < 0 or list(layers) != sorted(set(layers))):
            raise ValueError(f"got layers {list(layers)}; give numbers from 0 on, lowest first, each once")
        return layers


class Trainable(nn.Module, ABC):
    """What ``training.fit`` needs of a model of attention activations, and how it is saved.

    Subclasses are final and called ``Module``; their ``__init__(config, dims)`` only allocates. ``start_`` sets
    weights and normalisation from data, ``calibrate_`` fixes inference thresholds after training. In ``train()`` mode
    batch-wise selections (BatchTopK) look at the batch; in ``eval()`` mode they use the calibrated thresholds, so that
    a position's features do not depend on its neighbours in the batch.

    ``engine`` says how sparse products are computed. It is no part of what is saved.
    """

    Config: ClassVar[type[DictionaryConfig]]
    engine: Engine

    def __init__(self, config: Any, dims: ModelDims):
        super().__init__()
        for layer in config.layers:
            if layer >= dims.n_layers:
                raise ValueError(f"layer {layer} is out of range; the model has layers 0 to {dims.n_layers - 1}; "
                                 "correct layers")  # fmt: skip
        self.config = config
        self.dims = dims
        self.engine = Engine()

    @property
    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """The sites a batch must hold for ``loss`` (inputs, patterns and target)."""

    @property
    def start_sites(self) -> tuple[Site, ...]:
        """Sites that ``start_`` reads beside ``sites``. None by default."""
        return ()

    @abstractmethod
    def loss(self, batch: Batch, progress: float = 1.0) -> Loss:
        """The training loss of a batch (squared error summed over D, mean over counted positions, plus penalties)."""

    @abstractmethod
    def start_(self, batches: Sequence[Batch], weights: Mapping[int, LayerWeights], generator: torch.Generator) -> None:
        """Set normalisation, weights and thresholds from training batches. Random choices come from ``generator``."""

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """Every trainable parameter exactly once, grouped by learning rate."""

    def calibrate_(self, batches: Sequence[Batch]) -> None:
        """Fix what inference needs and training does not (thresholds). Nothing by default."""

    def project_(self) -> None:
        """Restore constraints after an optimiser step. Nothing by default."""

    def save(self, path: Path | str) -> None:
        """Write a directory holding weights.safetensors and dictionary.json; replaces an earlier one atomically."""
        with atomic_directory(path) as directory:
            save_tensors(directory / "weights.safetensors", self.state_dict())
            write_json(directory / "dictionary.json", {
                "format": _FORMAT,
                "config": self.config.model_dump(mode="json"),
                "dims": self.dims.model_dump(mode="json"),
            })  # fmt: skip

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Load what ``save`` wrote. ValueError when it is damaged or of another architecture."""
        path = Path(path)
        source = path / "dictionary.json"
        description = read_description(path)
        config = parse_section(cls.Config, description["config"], "config", source)
        module = cls(config, parse_section(ModelDims, description["dims"], "dims", source))
        weights = load_tensors(path / "weights.safetensors", "train the run again")
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}/weights.safetensors does not fit {source} ({reason}); "
                             "train the run again") from error  # fmt: skip
        return module.eval()


class Dictionary(Trainable):
    """A sparse dictionary over attention activations."""

    @property
    @abstractmethod
    def target_sites(self) -> tuple[Site, ...]:
        """The sites that ``reconstruct`` predicts, in the order of their columns in ``target``."""

    @property
    @abstractmethod
    def target_widths(self) -> tuple[int, ...]:
        """Columns of ``target`` that belong to each of ``target_sites``; they sum to D."""

    @abstractmethod
    def encode(self, batch: Batch, progress: float = 1.0) -> SparseCodes:
        """Key-side activations [N, F]; rows of masked positions are empty."""

    @abstractmethod
    def decode(self, codes: SparseCodes, batch: Batch) -> Float[Tensor, "B T D"]:
        """The predicted target in normalised units."""

    @abstractmethod
    def target(self, batch: Batch) -> Float[Tensor, "B T D"]:
        """The true target in normalised units: centred by the training mean, scaled to E||y||^2 = D per site."""

    @abstractmethod
    def denormalise(self, prediction: Float[Tensor, "B T D"]) -> dict[Site, Tensor]:
        """Turn a normalised prediction into raw activations per target site, in the site's own shape."""

    @abstractmethod
    def feature_norms(self) -> Float[Tensor, " F"]:
        """n_i: size of what feature i writes when it is active with value 1 (normalised units)."""

    @abstractmethod
    def head_loadings(self) -> Float[Tensor, "F heads"] | None:
        """The head loading vector of every feature, or None where features have no fixed heads."""

    @abstractmethod
    def folded(self) -> "Dictionary":
        """An inference copy that acts on raw activations: normalisation moved into the weights, buffers trivial.

        Its ``encode`` and ``reconstruct`` equal this module's in eval mode, to float tolerance. Everything that was in
        normalised units is raw in it: ``target``, ``decode``, ``feature_norms`` and head loadings; so train and
        evaluate this module and hand out the copy. BatchTopK becomes JumpReLU with theta_i = threshold / n_i, because
        n_i changes with the decoder's units. ValueError where a competition between features would change.
        """

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> dict[Site, Tensor]:
        """Raw predicted activations per target site, in the site's own shape."""
        return self.denormalise(self.decode(self.encode(batch), batch))


def read_description(path: Path | str) -> dict[str, Any]:
    """``dictionary.json`` of a saved dictionary: format, config, dims. ValueError when this version cannot read it."""
    path = Path(path) / "dictionary.json"
    description = read_json(path)
    if not isinstance(description, dict) or not {"format", "config", "dims"} <= description.keys():
        raise ValueError(f"{path} does not hold format, config and dims; train the run again")
    if description["format"] != _FORMAT:
        raise ValueError(f"{path} has format {description['format']!r}, this version reads {_FORMAT}; train the run "
                         "again, or read it with the version that wrote it")  # fmt: skip
    return description
