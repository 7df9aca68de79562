"""Where attention replacement layers start.

Shape legend: B contexts, T positions, n counted rows, D = d_model, G groups, H query heads and K key/value heads of the
base layer, E base head width, P = E // 2 pairs of a base head, C = e / 2 pairs of a group.

random: queries and keys of unit variance from Gaussian maps; every group is given pairs of frequencies spread over
the base layer's. base_qk: group g copies the queries and keys of base head g mod H. With e = E it copies all of them,
so its pattern is the base head's; narrower groups take pairs in the order of their size in the scores, each copy of a
head the next ones. The base layer's maps are read off its activations by least squares, which is exact where its norm
divides by the rms.

Values and outputs are Gaussian in both; a random start pulls every head towards the beginning-of-text token, because
base heads rest there (design choice).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosshead.attention.narrow_rotary import base_pairs
from crosshead.attention.replacement_config import Combined
from crosshead.dictionaries.base import Batch, Site
from crosshead.dictionaries.starts import near_rows, ridge
from crosshead.maths.patterns import undo_rotation

__all__ = ["start_replacement_"]

_FIRST_TOKEN_SCORE = 4.0
"""With scores of unit variance elsewhere the first token has half of the attention at position 33."""


@torch.no_grad()
def start_replacement_(module: Any, batches: Sequence[Batch], generator: torch.Generator) -> None:
    """Set units, queries, keys, values and outputs of an attention replacement layer."""
    module.start_units_(batches)
    config, combined, d = module.config, isinstance(module.config.variant, Combined), module.dims.d_model

    def noise(shape: Sequence[int], deviation: float) -> Tensor:
        return deviation * torch.randn(*shape, generator=generator).to(module.out)

    spread_pairs_(module)
    for maps in (module.query, module.key):
        maps.copy_(noise(maps.shape, d**-0.5))
    module.bos_score.fill_(_FIRST_TOKEN_SCORE)
    if combined:
        module.phase.copy_(noise(module.phase.shape, 1.0))
        x = torch.cat([module.inputs(b)[b.mask] for b in batches])
        module.encoder.weight.copy_(near_rows(x, len(module.out), generator)[0])
        module.encoder.start_bias_(x)
    else:
        module.value.copy_(noise(module.value.shape, d**-0.5))
    if config.start == "base_qk":
        copy_base_qk_(module, batches)
    module.out.copy_(noise(module.out.shape, len(module.out) ** -0.5))
    scale_outputs_(module, batches[: max(1, len(batches) // 4)])


def spread_pairs_(module: Any) -> None:
    """Frequencies of every group, spread evenly over the base layer's pairs; neighbouring groups take neighbours."""
    base, (groups, pairs) = module.base_frequency, module.frequency.shape
    if isinstance(module.config.variant, Combined):
        # Features of content alone and features that turn take turns.
        turning = torch.arange(groups, device=base.device)[:, None] + torch.arange(0, pairs, 2, device=base.device) // 2
        module.frequency.zero_()[:, 0::2] = base[turning % len(base)]
        return
    step = max(1, len(base) // pairs)
    places = torch.arange(groups, device=base.device)[:, None] + step * torch.arange(pairs, device=base.device)
    module.frequency.copy_(base[places % len(base)])


def copy_base_qk_(module: Any, batches: Sequence[Batch]) -> None:
    """Queries and keys of the base layer, by pairs; see the module's text."""
    dims, layer = module.dims, module.layer
    pairs = base_pairs(dims.head_dim, int(module.base_rotated), bool(module.base_interleaved)).to(module.out.device)
    n_pairs = module.frequency.shape[1]
    if n_pairs > len(pairs):
        raise ValueError(f"head_dim={module.config.head_dim} exceeds the base layer's {dims.head_dim}; lower it or set "
                         "start: random")  # fmt: skip
    if not float(module.base_scale):
        raise ValueError("start: base_qk needs the layer's attention spec; call use_attention_ before start_")
    x = torch.cat([module.inputs(b)[b.mask] for b in batches])
    q, k = (_unturned(module, batches, Site(layer, name)) for name in ("q", "k"))
    q_maps, q_bias = _linear(x, torch.cat([part.transpose(1, 2)[b.mask] for part, b in zip(q, batches, strict=True)]))
    k_maps, k_bias = _linear(x, torch.cat([part.transpose(1, 2)[b.mask] for part, b in zip(k, batches, strict=True)]))
    bos = k[0][0, :, 0]
    shared = dims.n_heads // dims.n_kv_heads
    k_maps, k_bias, bos = (part.repeat_interleave(shared, 0) for part in (k_maps, k_bias, bos))
    order = _by_power(x, q_maps, k_maps, pairs)
    # Scores of our heads are divided by sqrt(e), theirs multiplied by the base layer's own scale.
    factor = float(module.base_scale) * float(module.base_factor) ** 2 / module.scale
    for group in range(len(module.frequency)):
        copy, head = divmod(group, dims.n_heads)
        places = (copy * n_pairs + torch.arange(n_pairs, device=order.device)) % len(pairs)
        chosen = order[head][places]
        columns = pairs[chosen].flatten()
        module.frequency[group] = module.base_frequency[chosen]
        module.query[group], module.query_bias[group] = factor * q_maps[head, columns], factor * q_bias[head, columns]
        module.key[group], module.key_bias[group] = k_maps[head, columns], k_bias[head, columns]
        module.bos_key[group] = bos[head, columns]
    module.bos_score.zero_()


def _unturned(module: Any, batches: Sequence[Batch], site: Site) -> list[Float[Tensor, "B heads T E"]]:
    """Queries or keys before rotary embedding."""
    rotated = int(module.base_rotated)
    if not rotated:
        return [b[site].float() for b in batches]
    found = []
    for b in batches:
        position = torch.arange(b[site].shape[2], device=b[site].device, dtype=torch.float32)
        angle = position[:, None] * module.base_frequency[: rotated // 2].float()
        interleaved = bool(module.base_interleaved)
        angle = angle.repeat_interleave(2, 1) if interleaved else torch.cat([angle, angle], 1)
        factor = float(module.base_factor)
        cos, sin = factor * angle.cos(), factor * angle.sin()
        found.append(undo_rotation(b[site].float(), cos, sin, interleaved=interleaved))
    return found


def _linear(
    x: Float[Tensor, "n D"], y: Float[Tensor, "n heads E"]
) -> tuple[Float[Tensor, "heads E D"], Float[Tensor, "heads E"]]:
    """Least squares y = W x + b per head; almost no ridge, because the map is there to be found."""
    ones = torch.cat([x, torch.ones_like(x[:, :1])], 1).double()
    solution = ridge(ones, y.flatten(1).double(), 1e-9)
    maps = solution[:-1].T.unflatten(0, y.shape[1:]).to(y.dtype)
    return maps, solution[-1].view(y.shape[1:]).to(y.dtype)


def _by_power(x: Tensor, q_maps: Tensor, k_maps: Tensor, pairs: Int[Tensor, "P 2"]) -> Int[Tensor, "H P"]:
    """Pairs of every head by what they add to scores (product of the mean squares of q and k), largest first."""
    sizes = [torch.einsum("nd,hed->nhe", x, maps).square().mean(0)[:, pairs].sum(-1) for maps in (q_maps, k_maps)]
    return (sizes[0] * sizes[1]).argsort(dim=1, descending=True, stable=True)


def scale_outputs_(module: Any, batches: Sequence[Batch]) -> None:
    """Outputs at a size at which what is written has a tenth of the target's: it can neither hurt nor be lost."""
    mode, wanted, power = module.training, 0.0, 0.0
    module.train()
    for b in batches:
        wanted += float(module.target(b)[b.mask].double().square().sum())
        power += float(module.decode(module.encode(b), b)[b.mask].double().square().sum())
    module.out.mul_(0.1 * (wanted / max(power, 1e-30)) ** 0.5)
    module.train(mode)
