"""Where a QK diagonalization starts from: the head's own form, weighted by the data.

Shape legend: n counted rows, X encoder width, E head width, G heads, F features, C channels, D distances.

1. Means and scales from counted positions; per head the size of centred scores.
2. The head's form q' M k (centred q', k') in coordinates in which it is a plain product and both sides have the same
   diagonal covariance: the data-weighted singular value decomposition. M is the identity for rotated features, the
   mean rotation over the distances of a context for content features, and for features with a kernel of distance the
   rotations at a few drawn distances together: a plane that says nothing at one says something at another.
3. A feature's two directions are the query and the key of a training pair, drawn by its squared centred score of either
   sign, each weighed as those coordinates weigh it. Relu features cannot change the sign of a side in training, so
   sides that are derived from one another by M start wrong wherever a plane subtracts.
4. With a rank above 1, a feature's maps are the singular vectors of the form weighted by the rows where it is active.
5. Kernels from what a feature's activations say of queries and keys (one regression per channel and side).
6. Strengths, signed, by least squares on the centred scores of some queries.

All of it is a design choice.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from crosshead.attention.pairs import kernel_table
from crosshead.dictionaries.base import Batch
from crosshead.dictionaries.starts import Moments, ridge
from crosshead.maths.codes import SparseCodes

if TYPE_CHECKING:
    from crosshead.attention.qk_diagonal import Module

__all__ = ["balanced_coordinates", "mean_rotation", "start_"]

_DISTANCES = 8
"""Distances whose rotations say together how much a direction of queries or keys matters to features with a kernel."""
_RIDGE = 1e-2
_CHUNK = 512


class _Drawn(NamedTuple):
    """What every feature starts from: a head, and a query and a key of its rows."""

    head: Int[Tensor, " F"]
    query: Int[Tensor, " F"]
    key: Int[Tensor, " F"]


class _Rows(NamedTuple):
    """Counted positions of the start sample."""

    x_query: Float[Tensor, "n Xq"]
    x_key: Float[Tensor, "n Xk"]
    q: Float[Tensor, "n G E"]
    """Centred, as the features see them: un-rotated unless position is rotated."""
    k: Float[Tensor, "n G E"]


@torch.no_grad()
def start_(module: "Module", batches: Sequence[Batch], generator: torch.Generator) -> None:
    """Set units, encoders, maps, kernels and strengths. ValueError when no position counts."""
    rows = _start_units_(module, batches)
    drawn = _draw_pairs(module, batches, generator)
    forms = _forms(module, generator)
    _start_encoders_(module, rows, drawn, forms)
    codes = _codes(module, rows)
    if module.config.rank > 1:
        _start_maps_(module, rows, drawn.head, codes)
    _start_kernels_(module, rows, drawn.head, codes)
    module.fix_gauge_()
    _start_strengths_(module, batches, generator)


# ---- units ----


def _start_units_(module: "Module", batches: Sequence[Batch]) -> _Rows:
    for side, position in (("query", 0), ("key", 1)):
        found = Moments(module.raw_inputs(b)[position].float()[b.mask] for b in batches)
        getattr(module, f"{side}_mean").copy_(found.mean)
        getattr(module, f"{side}_scale").fill_(found.scale)
    inputs = [tuple(x[b.mask.flatten()] for x in module.inputs(b)) for b in batches]
    plain, seen = [], []
    for batch in batches:
        q, k = module.queries_keys(batch)
        unrotated = module.positions.unrotated(q), module.positions.unrotated(k)
        plain.append(tuple(x.transpose(1, 2)[batch.mask] for x in unrotated))
        both = (q, k) if module.config.position == "rotated" else unrotated
        seen.append(tuple(x.transpose(1, 2)[batch.mask] for x in both))
    for mean, position in ((module.mean_query, 0), (module.mean_key, 1)):
        mean.copy_(torch.cat([rows[position] for rows in plain]).mean(0))
    _start_scores_(module, batches)
    x_query, x_key = (torch.cat([x[i] for x in inputs]) for i in (0, 1))
    q, k = (torch.cat([x[i] for x in seen]) for i in (0, 1))
    return _Rows(x_query, x_key, q - q.mean(0), k - k.mean(0))


def _start_scores_(module: "Module", batches: Sequence[Batch]) -> None:
    """Root mean square of centred scores, and what the beginning-of-text key scores over the mean of the others."""
    from crosshead.attention.qk_diagonal import centred

    squares, n_pairs = torch.zeros(len(module.heads), dtype=torch.float64, device=module.heads.device), 0
    gaps = []
    for batch in batches:
        true, allowed = module.true_scores(batch), module.positions.allowed(batch.mask)
        squares += centred(true, allowed).double().square().sum((0, 2, 3))
        n_pairs += int(allowed.sum())
        gap = true[..., 0] - (true * allowed).sum(-1) / allowed.sum(-1).clamp(min=1)
        gaps.append(gap.transpose(1, 2)[batch.mask])
    gap = torch.cat(gaps)
    module.score_size.copy_((squares / max(n_pairs, 1)).sqrt().clamp(min=1e-6))
    module.first_mean.copy_(gap.mean(0))
    module.first_size.copy_(gap.std(0).clamp(min=1e-6))


# ---- directions ----


def rotations(module: "Module", n_positions: int) -> Float[Tensor, "D E E"]:
    """The matrix of q' M k that the rotation is, for un-rotated q and k, at every distance; one where nothing turns."""
    width = module.dims.head_dim
    eye = torch.eye(width, device=module.heads.device)
    if not module.positions.rotates:
        return eye[None]
    return module.positions.rotated(eye[:, None].expand(width, n_positions, width)).transpose(0, 1)


def mean_rotation(module: "Module", n_positions: int) -> Float[Tensor, "E E"]:
    """The same in the mean over all pairs of a context's positions."""
    turned = rotations(module, n_positions)
    weight = torch.arange(len(turned), 0, -1, device=turned.device).float()
    return torch.einsum("def,d->ef", turned, weight / weight.sum())


def _forms(module: "Module", generator: torch.Generator) -> Float[Tensor, "M E E"]:
    """The matrices M that directions are weighed by; rotations are drawn as often as pairs lie that far apart."""
    position, n_positions = module.config.position, len(module.positions.cos)
    if position == "content":
        return mean_rotation(module, n_positions)[None]
    if position == "rotated" or not module.positions.rotates:
        return torch.eye(module.dims.head_dim, device=module.heads.device)[None]
    weight = torch.arange(n_positions, 0, -1).float()
    drawn = torch.multinomial(weight, min(_DISTANCES, n_positions), generator=generator)
    return rotations(module, n_positions)[drawn.to(module.heads.device)]


def _draw_pairs(module: "Module", batches: Sequence[Batch], generator: torch.Generator) -> _Drawn:
    """Heads in turn; of the head's pairs one each, by its squared centred score."""
    from crosshead.attention.qk_diagonal import centred

    n_features = module.config.features
    head = torch.arange(n_features) % len(module.heads)
    of_batch = torch.randint(len(batches), (n_features,), generator=generator)
    query, key, first = torch.zeros_like(head), torch.zeros_like(head), 0
    for i, batch in enumerate(batches):
        mask, allowed = batch.mask.cpu(), module.positions.allowed(batch.mask)
        true = module.true_scores(batch)
        if module.config.base == "mean":
            true = true - module.base_scores(batch)
        size = centred(true, allowed).square().cpu()
        row = first + (mask.flatten().cumsum(0) - 1).view_as(mask)
        for g in range(len(module.heads)):
            mine = torch.nonzero((of_batch == i) & (head == g)).flatten()
            weight = size[:, g].flatten()
            if not len(mine) or not float(weight.sum()):
                continue
            place = torch.multinomial(weight, len(mine), replacement=True, generator=generator)
            context, t, s = (x for x in torch.unravel_index(place, size[:, g].shape))
            query[mine], key[mine] = row[context, t], row[context, s]
        first += int(mask.sum())
    return _Drawn(*(x.to(module.heads.device) for x in (head, query, key)))


def balanced_coordinates(
    q: Float[Tensor, "n E"], k: Float[Tensor, "n E"], form: Float[Tensor, "E E"]
) -> tuple[Float[Tensor, "E E"], Float[Tensor, "E E"], Float[Tensor, " E"]]:
    """A and B with (q A).(k B) = q form k, both sides' second moments diagonal and equal to the third, singular values.

    The data-weighted singular value decomposition; its first R coordinates are the best form of rank R on independent
    queries and keys.
    """
    roots = []
    for x in (q.double(), k.double()):
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        values = values.clamp(min=1e-6 * float(values.max()) + 1e-12)
        roots.append(((vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T))
    (root_q, inverse_q), (root_k, inverse_k) = roots
    left, singular, right = torch.linalg.svd(root_q @ form.double() @ root_k)
    size = singular.sqrt()
    return ((inverse_q @ left) * size).to(q), ((inverse_k @ right.T) * size).to(q), singular.to(q)


def _reading(module: "Module", rows: _Rows, g: int) -> tuple[Float[Tensor, "Xq E"], Float[Tensor, "Xk E"]]:
    """Linear maps from what the encoders read to one head's centred queries and keys."""
    if module.config.input == "resid":
        return ridge(rows.x_query, rows.q[:, g]), ridge(rows.x_key, rows.k[:, g])
    width = module.dims.head_dim
    kv = module.key_heads.index(int(module.heads[g]) // (module.dims.n_heads // module.dims.n_kv_heads))
    maps = []
    for x, place, scale in ((rows.x_query, g, module.query_scale), (rows.x_key, kv, module.key_scale)):
        reading = x.new_zeros(x.shape[1], width)
        reading[place * width : (place + 1) * width] = torch.eye(width, device=x.device) / scale
        maps.append(reading)
    return maps[0], maps[1]


def _start_encoders_(module: "Module", rows: _Rows, drawn: _Drawn, forms: Float[Tensor, "M E E"]) -> None:
    for g in range(len(module.heads)):
        q, k = rows.q[:, g], rows.k[:, g]
        mine = drawn.head == g
        found = [balanced_coordinates(q, k, form) for form in forms]
        sides = ((q, drawn.query, module.query_encoder), (k, drawn.key, module.key_encoder))
        for side, ((x, chosen, encoder), read) in enumerate(zip(sides, _reading(module, rows, g), strict=True)):
            maps = torch.cat([both[side] for both in found], 1) * len(found) ** -0.5
            encoder.weight[mine] = functional.normalize(x[chosen[mine]] @ maps, dim=1) @ (read @ maps).T
    module.query_encoder.start_bias_(rows.x_query)
    module.key_encoder.start_bias_(rows.x_key)


def _codes(module: "Module", rows: _Rows) -> tuple[SparseCodes, SparseCodes]:
    """Features of the start sample, as training ends to choose them."""
    mask = torch.ones(len(rows.q), dtype=torch.bool, device=rows.q.device)
    norms = module.feature_norms()
    return (module.query_encoder(rows.x_query, mask, norms, 1.0, module.engine).codes,
            module.key_encoder(rows.x_key, mask, norms, 1.0, module.engine).codes)  # fmt: skip


# ---- interactions ----


def _start_maps_(
    module: "Module", rows: _Rows, own_head: Int[Tensor, " F"], codes: tuple[SparseCodes, SparseCodes]
) -> None:
    rank, width = module.config.rank, module.dims.head_dim
    form = torch.eye(width, device=rows.q.device)
    if module.config.position == "content":
        form = mean_rotation(module, len(module.positions.cos))
    orders = [c.by_column for c in codes]
    for g in range(len(module.heads)):
        read_q, read_k = _reading(module, rows, g)
        for i in torch.nonzero(own_head == g).flatten().tolist():
            q, k = (x[order.rows[int(order.offsets[i]) : int(order.offsets[i + 1])], g]
                    for x, order in zip((rows.q, rows.k), orders, strict=True))  # fmt: skip
            q, k = (own if len(own) > 1 else every[:, g] for own, every in ((q, rows.q), (k, rows.k)))
            to_query, to_key, _ = balanced_coordinates(q, k, form)
            own = slice(i * rank, i * rank + min(rank, width))
            n_own = own.stop - own.start
            module.query_map[own, :-1] = (read_q @ to_query[:, :n_own]).T
            module.key_map[own, :-1] = (read_k @ to_key[:, :n_own]).T


def _start_kernels_(
    module: "Module", rows: _Rows, own_head: Int[Tensor, " F"], codes: tuple[SparseCodes, SparseCodes]
) -> None:
    """Kernels of unit norm: a.Rot_d b with what the channel's activations say of query and key."""
    rank = module.config.rank
    if module.config.rank > 1:
        codes = (module._channels(codes[0], rows.x_query, module.query_map),
                 module._channels(codes[1], rows.x_key, module.key_map))  # fmt: skip
    head_of_channel = own_head.repeat_interleave(rank)
    for g in range(len(module.heads)):
        mine = torch.nonzero(head_of_channel == g).flatten()
        if module.config.position != "rotary":
            module.kernel[mine, g] = 1.0
            continue
        vectors = [_told(code, x[:, g])[mine] for code, x in zip(codes, (rows.q, rows.k), strict=True)]
        module.kernel[mine, g] = module.positions.kernel_of(vectors[0], vectors[1])
    by_feature = module.kernel.view(module.config.features, -1)
    silent = by_feature.norm(dim=1) < 1e-12
    by_feature[silent] = 1.0
    by_feature.copy_(functional.normalize(by_feature, dim=1))


def _told(codes: SparseCodes, x: Float[Tensor, "n E"]) -> Float[Tensor, "C E"]:
    """Of every channel: the regression of ``x`` on it alone."""
    power = codes.with_values(codes.values.square()).feature_sums()
    told = x.new_zeros(codes.n_features, x.shape[1])
    told.index_add_(0, codes.columns, x[codes.rows] * codes.values[:, None])
    return told / power.clamp(min=1e-12)[:, None]


def _start_strengths_(module: "Module", batches: Sequence[Batch], generator: torch.Generator) -> None:
    """Ridge regression of the centred scores of some queries on what every feature would write with strength 1."""
    n_features, wanted = module.config.features, -(-module.config.start_queries // len(batches))
    gram = torch.zeros(n_features, n_features, dtype=torch.float64, device=module.heads.device)
    right = gram.new_zeros(n_features)
    kernel = kernel_table(module.coefficients(), module.basis())
    for batch in batches:
        sides = module.sides(batch)
        u, v = (codes.to_dense().view(*batch.mask.shape, -1) for codes in (sides.query_channels, sides.key_channels))
        true, allowed = module.true_scores(batch), module.positions.allowed(batch.mask)[:, 0]
        if module.config.base == "mean":
            true = true - module.base_scores(batch)
        places = torch.nonzero(batch.mask & (allowed.sum(-1) > 1))
        for c, t in places[torch.randperm(len(places), generator=generator)[:wanted].to(places.device)].tolist():
            keys = torch.nonzero(allowed[c, t]).flatten()
            distances = t - keys if kernel.shape[1] > 1 else torch.zeros_like(keys)
            written = (u[c, t] * v[c, keys])[..., None] * kernel[:, distances].transpose(0, 1)
            written = written.unflatten(1, (n_features, -1)).sum(2)
            written = (written - written.mean(0)).transpose(1, 2).flatten(0, 1).double()
            target = true[c, :, t, keys].T
            target = ((target - target.mean(0)) / module.score_size).flatten().double()
            gram += written.T @ written
            right += written.T @ target
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + 1e-12)
    strength = torch.linalg.solve(gram, right).to(module.strength)
    size = strength.abs()
    least = 0.1 * size.mean().clamp(min=1e-3)
    module.strength.copy_(torch.where(size < least, torch.where(strength < 0, -least, least), strength))
