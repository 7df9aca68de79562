"""What the position-wise sparse autoencoders share: one encoder, one decoder, the loss; no attention.

Shape legend: B contexts, T positions, N = B*T rows, F features, D width of the concatenated sites.

    f = act(W x + b),   x_hat = f D + b_d,   loss = ||x - x_hat||^2 + lambda_s sum_i f_i n_i (+ its negative twin)

Every site is centred by its training mean and scaled by one factor to E||x||^2 = its width, so that layers enter with
equal power per coordinate. Subclasses say which sites they read and how a feature's size n_i is measured.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosshead.dictionaries.base import Batch, Dictionary, LayerWeights, Loss, ModelDims, ParameterGroup
from crosshead.dictionaries.encoder import SparseEncoder
from crosshead.dictionaries.sparsity import TopK, folded_sparsity
from crosshead.dictionaries.starts import Moments, near_rows
from crosshead.maths.codes import SparseCodes
from crosshead.maths.sparse import decode

__all__ = ["Autoencoder"]


class Autoencoder(Dictionary):
    """Base of the position-wise autoencoders. The target is the input."""

    means: Tensor
    scales: Tensor

    def __init__(self, config, dims: ModelDims):
        super().__init__(config, dims)
        width = sum(self.target_widths)
        self.encoder = SparseEncoder(width, config.features, config.sparsity)
        self.decoder = nn.Parameter(torch.zeros(config.features, width))
        self.decoder_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("means", torch.zeros(width))
        self.register_buffer("scales", torch.ones(len(self.target_widths)))

    @abstractmethod
    def raw(self, batch: Batch) -> list[Float[Tensor, "B T width"]]:
        """The raw activations of every target site, flattened to one width each."""

    @abstractmethod
    def feature_norms(self) -> Float[Tensor, " F"]: ...

    def target(self, batch: Batch) -> Float[Tensor, "B T D"]:
        return (torch.cat([x.to(self.means.dtype) for x in self.raw(batch)], dim=-1) - self.means) * self.column_scales

    @property
    def column_scales(self) -> Float[Tensor, " D"]:
        """Each site's scale, repeated over its columns."""
        widths = torch.tensor(self.target_widths, device=self.scales.device)
        return self.scales.repeat_interleave(widths)

    def unscaled(self, prediction: Float[Tensor, "B T D"]) -> list[Float[Tensor, "B T width"]]:
        """Undo centring and scaling, split by site."""
        raw = prediction / self.column_scales + self.means
        return list(raw.split(list(self.target_widths), dim=-1))

    def _inputs(self, batch: Batch) -> Float[Tensor, "N D"]:
        return (self.target(batch) * batch.mask[..., None]).flatten(0, 1)

    def encode(self, batch: Batch, progress: float = 1.0) -> SparseCodes:
        with torch.no_grad():
            norms = self.feature_norms()
        return self.encoder(self._inputs(batch), batch.mask.flatten(), norms, progress, self.engine).codes

    def decode(self, codes: SparseCodes, batch: Batch) -> Float[Tensor, "B T D"]:
        return (decode(codes, self.decoder, self.engine) + self.decoder_bias).view(*batch.mask.shape, -1)

    def loss(self, batch: Batch, progress: float = 1.0) -> Loss:
        x, mask = self._inputs(batch), batch.mask.flatten()
        norms = self.feature_norms()
        activations = self.encoder(x, mask, norms.detach(), progress, self.engine, for_penalties=True)
        codes, target = activations.codes, x[mask]
        error = (decode(codes, self.decoder, self.engine)[mask] + self.decoder_bias - target).square().sum()
        parts = {"reconstruction": error / len(target)}
        parts |= self.encoder.penalties(activations, norms, len(target), progress)
        return Loss.of(parts, codes, error, target)

    @torch.no_grad()
    def folded(self) -> "Autoencoder":
        sparsity = folded_sparsity(self.config.sparsity)
        if isinstance(sparsity, TopK) and (self.scales != self.scales[0]).any():
            scales = ", ".join(f"{scale:.4g}" for scale in self.scales.tolist())
            raise ValueError(f"topk compares f_i n_i, which folding sites of scales ({scales}) into the decoder "
                             "would change unevenly; use sparsity.kind: batch_topk, which folds")  # fmt: skip
        folded = type(self)(self.config.model_copy(update={"sparsity": sparsity}), self.dims).to(self.decoder)
        scales = self.column_scales.double()
        encoder = self.encoder.folded_state(self.means, scales, self.feature_norms())
        folded.load_state_dict(self.state_dict() | {f"encoder.{name}": tensor for name, tensor in encoder.items()} | {
            "decoder": self.decoder.double() / scales,
            "decoder_bias": self.decoder_bias.double() / scales + self.means.double(),
            "means": torch.zeros_like(self.means),
            "scales": torch.ones_like(self.scales),
        })  # fmt: skip
        folded.engine = self.engine
        return folded.eval()

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("all", list(self.parameters()), 1.0)]

    @torch.no_grad()
    def start_(self, batches: Sequence[Batch], weights: Mapping[int, LayerWeights], generator: torch.Generator) -> None:
        per_site = zip(*(self.raw(b) for b in batches), strict=True)
        masks = [b.mask for b in batches]
        moments = [Moments(x.float()[m] for x, m in zip(site, masks, strict=True)) for site in per_site]
        self.means.copy_(torch.cat([m.mean for m in moments]))
        self.scales.copy_(torch.tensor([m.scale for m in moments]))
        x = torch.cat([self._inputs(b)[b.mask.flatten()] for b in batches])
        self.decoder.copy_(near_rows(x, self.config.features, generator)[0])
        self.encoder.weight.copy_(self.decoder)
        self.encoder.start_bias_(x)
        self._fit_scale(batches[0])

    def _fit_scale(self, batch: Batch) -> None:
        """One least-squares factor on all decoder rows: a start at the data's own magnitude."""
        mode = self.training
        self.train()
        target = self.target(batch)[batch.mask]
        written = self.decode(self.encode(batch), batch)[batch.mask]
        self.decoder.mul_(((written * target).sum() / written.square().sum().clamp(min=1e-12)).clamp(min=1e-3))
        self.train(mode)

    def calibrate_(self, batches: Sequence[Batch]) -> None:
        rows = [(self._inputs(b), b.mask.flatten()) for b in batches]
        with torch.no_grad():
            self.encoder.calibrate_(rows, self.feature_norms(), self.engine)
