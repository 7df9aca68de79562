"""Where dictionaries that move features by head patterns start: from what every head of the layer moves already.

Shape legend: B contexts, T positions, n counted rows, F features, H query heads, K key/value heads, E head width,
M = H + 1 movers (index 0 is the identity), D = d_model.

Base maps M_h lead from the input to what mover h would write: a ridge map to its head's values and W_O^h; for the
identity a ridge map to the target. A feature is bound to a mover drawn by the energy that movers write and to a token
of the start sample; its decoder is what that mover would write of that token (design choice).
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from crosshead.dictionaries.base import Batch, LayerWeights, Site
from crosshead.dictionaries.moving import Moving
from crosshead.dictionaries.starts import ridge, value_map

__all__ = [
    "StartTokens",
    "base_maps",
    "draw_movers",
    "draw_sources",
    "fit_scales_",
    "moved_energies",
    "pattern_gram",
    "start_loadings_",
]

StartTokens = Literal["uniform", "energy"]


def base_maps(
    module: Moving, batches: Sequence[Batch], layer: LayerWeights, x: Float[Tensor, "n D"]
) -> Float[Tensor, "M D D"]:
    """Linear maps from the input to what each mover would write: ridge to its head's values, then W_O."""
    target = torch.cat([module.target(b)[b.mask] for b in batches])
    identity = ridge(x, target)
    to_value = value_map(x, batches, Site(module.layer, "v"))
    to_value = to_value.repeat_interleave(module.dims.n_heads // module.dims.n_kv_heads, dim=1)
    heads = torch.einsum("dhe,hec->hdc", to_value, layer.W_O.to(x)) * module.target_scale
    return torch.cat([identity[None], heads])


def draw_movers(
    module: Moving, batches: Sequence[Batch], maps: Float[Tensor, "M D D"], generator: torch.Generator
) -> Int[Tensor, " F"]:
    """A mover for every feature: heads by their share of the energy they write, a few on the identity."""
    energy = torch.zeros(module.dims.n_heads, device=maps.device)
    for b in batches:
        x = module.inputs(b).view(*b.mask.shape, -1)
        for h in range(module.dims.n_heads):
            energy[h] += (b[Site(module.layer, "pattern")][:, h] @ (x @ maps[h + 1])).square().sum()
    share = module.config.start_identity
    probabilities = torch.cat([energy.new_tensor([share]), (1 - share) * energy / energy.sum()])
    drawn = torch.multinomial(probabilities.cpu(), module.config.features, replacement=True, generator=generator)
    return drawn.to(maps.device)


def draw_sources(
    module: Moving,
    batches: Sequence[Batch],
    maps: Float[Tensor, "M D D"],
    mover: Int[Tensor, " F"],
    by: StartTokens,
    generator: torch.Generator,
) -> Int[Tensor, " F"]:
    """A counted position for every feature, by its number among those of all batches.

    ``uniform``: any. ``energy``: with probability proportional to what the feature's mover moves from there,
    ||x_s M_h||^2 times the attention that position s receives from head h (``moved_energies``).
    """
    if by == "uniform":
        n_rows = sum(b.n_counted for b in batches)
        return torch.randint(n_rows, mover.shape, generator=generator).to(mover.device)
    energies, sources = moved_energies(module, batches, maps).cpu(), torch.zeros_like(mover)
    for m, energy in enumerate(energies):
        mine = mover == m
        if count := int(mine.sum()):
            # A mover that moves nothing anywhere draws from all positions alike.
            drawn = torch.multinomial(energy.clamp(min=1e-30), count, replacement=True, generator=generator)
            sources[mine] = drawn.to(mover.device)
    return sources


def moved_energies(module: Moving, batches: Iterable[Batch], maps: Float[Tensor, "M D D"]) -> Float[Tensor, "M n"]:
    """||x_s M_h||^2 sum_t A_h(t, s) at every counted s, the sum over counted t; ||x_s M_0||^2 for the identity."""
    per_batch = []
    for b in batches:
        x = module.inputs(b)[b.mask.flatten()]
        sizes = torch.stack([(x @ own).square().sum(1) for own in maps])
        received_BHT = (b[Site(module.layer, "pattern")] * b.mask[:, None, :, None]).sum(2)
        sizes[1:] *= received_BHT.transpose(0, 1)[:, b.mask]
        per_batch.append(sizes)
    return torch.cat(per_batch, dim=1)


def start_loadings_(module: Moving, mover: Int[Tensor, " F"], generator: torch.Generator) -> None:
    """Loadings one-hot on each feature's mover, plus noise."""
    module.fixed_movers.copy_(mover)
    noise = torch.randn(module.loadings.shape, generator=generator).to(mover.device) * module.config.start_noise
    module.loadings.copy_(nn.functional.one_hot(mover, len(module.loadings)).T.float() + noise)
    module.project_()


def fit_scales_(module: Moving, batches: Sequence[Batch], mover: Int[Tensor, " F"]) -> None:
    """Least squares for c_h and b_d, then for one scale per mover on what is left."""
    first_column = torch.cat([b[Site(module.layer, "pattern")][..., 0].transpose(1, 2)[b.mask] for b in batches])
    target = torch.cat([module.target(b)[b.mask] for b in batches])
    design = torch.cat([first_column, torch.ones_like(first_column[:, :1])], dim=1)
    solution = ridge(design, target, 1e-6)
    module.bos.copy_(solution[:-1])
    module.decoder_bias.copy_(solution[-1])

    gram = target.new_zeros(len(module.loadings), len(module.loadings)).double()
    moment = gram[0].clone()
    remaining = 0.0
    mode = module.training
    module.train()
    for b in batches:
        codes = module.encode(b)
        base = module.decode(codes.with_values(torch.zeros_like(codes.values)), b)
        rest = (module.target(b) - base)[b.mask].double()
        parts = []
        for m in range(len(module.loadings)):
            own = codes.with_values(codes.values * (mover[codes.columns] == m))
            parts.append((module.decode(own, b) - base)[b.mask].double().flatten())
        written = torch.stack(parts)
        gram += written @ written.T
        moment += written @ rest.flatten()
    module.train(mode)
    gram.diagonal().add_(1e-6 * gram.diagonal().mean() + 1e-12)
    scales = torch.linalg.solve(gram, moment).clamp(min=1e-3).to(target.dtype)
    module.decoder.mul_(scales[mover][:, None])
    for b in batches:
        error = (module.target(b) - module.decode(module.encode(b), b))[b.mask]
        remaining = remaining + error.mean(0) / len(batches)
    module.decoder_bias.add_(remaining)


@torch.no_grad()
def pattern_gram(batches: Iterable[tuple[Float[Tensor, "B H T T"], Bool[Tensor, "B T"]]]) -> Float[Tensor, "M M"]:
    """Gram matrix of the identity and the head patterns, beginning-of-text key left out, unit diagonal."""
    total: Tensor | float = 0.0
    for pattern, mask in batches:
        heads = (pattern * mask[:, None, :, None] * mask[:, None, None, :]).double()
        identity = torch.diag_embed(mask.double())[:, None]
        movers = torch.cat([identity, heads], dim=1).transpose(0, 1).flatten(1)
        total = total + movers @ movers.T
    assert isinstance(total, Tensor)
    scale = total.diagonal().clamp(min=1e-12).rsqrt()
    return (total * scale[:, None] * scale).float()
