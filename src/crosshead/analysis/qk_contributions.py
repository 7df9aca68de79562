"""What single QK features write into the scores: whole rows of one feature, or all features at one query.

Shape legend: B contexts, T positions (t query, s key), G heads, F features, C = F * r channels, D distances.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosshead.attention.pairs import kernel_table
from crosshead.attention.qk_diagonal import Module
from crosshead.dictionaries.base import Batch

__all__ = ["Contributions", "contributions"]


class Contributions(NamedTuple):
    """A batch's features with their kernels, in raw scores."""

    query: Float[Tensor, "B T C"]
    key: Float[Tensor, "B T C"]
    kernel: Float[Tensor, "C D G"]
    first: Float[Tensor, "C G"]
    """Score that a unit of the query side's channel gives to the beginning-of-text key."""
    rank: int
    query_active: Float[Tensor, "B T F"]
    """u of the features (for rank above 1: before gates and maps)."""
    key_active: Float[Tensor, "B T F"]

    def of_feature(self, context: int, feature: int, key_feature: int | None = None) -> Float[Tensor, "T T G"]:
        """What one feature writes into every score of a context; the beginning-of-text key is left out.

        ``key_feature`` pairs its query side and kernel with the key side of another.
        """
        n_positions = self.query.shape[1]
        other = feature if key_feature is None else key_feature
        place = torch.arange(n_positions, device=self.query.device)
        distance = place[:, None] - place
        far = distance.clamp(min=0) if self.kernel.shape[1] > 1 else torch.zeros_like(distance)
        written = self.query.new_zeros(n_positions, n_positions, self.kernel.shape[2])
        for j in range(self.rank):
            channel = feature * self.rank + j
            u, v = self.query[context, :, channel], self.key[context, :, other * self.rank + j]
            on_t, on_s = torch.nonzero(u).flatten(), torch.nonzero(v).flatten()
            part = (u[on_t, None] * v[on_s])[..., None] * self.kernel[channel][far[on_t[:, None], on_s]]
            written[on_t[:, None], on_s] += part
        return written * (distance >= 0)[..., None]

    def at_query(self, context: int, query: int, head: int) -> Float[Tensor, "F T"]:
        """What every feature writes into one query's scores of one head (its place among the module's heads)."""
        u, v = self.query[context, query], self.key[context, : query + 1]
        distance = query - torch.arange(query + 1, device=u.device)
        kernel = self.kernel[:, distance if self.kernel.shape[1] > 1 else torch.zeros_like(distance), head]
        written = u[:, None] * v.T * kernel
        written[:, 0] = u * self.first[:, head]
        by_feature = written.unflatten(0, (-1, self.rank)).sum(1)
        rest = by_feature.new_zeros(len(by_feature), self.query.shape[1] - query - 1)
        return torch.cat([by_feature, rest], dim=1)

    def features(self) -> Iterator[int]:
        """Features that are active on both sides somewhere."""
        both = self.query_active.flatten(0, 1).any(0) & self.key_active.flatten(0, 1).any(0)
        return iter(torch.nonzero(both).flatten().tolist())


@torch.no_grad()
def contributions(module: Module, batch: Batch) -> Contributions:
    """Of a module in eval mode."""
    sides = module.sides(batch)
    shape = (*batch.mask.shape, -1)
    query, key, query_active, key_active = (
        codes.to_dense().view(shape)
        for codes in (sides.query_channels, sides.key_channels, sides.query.codes, sides.key.codes)
    )
    kernel = kernel_table(module.coefficients(), module.basis()) * module.score_size
    first = module.first_affinity * module.first_size
    return Contributions(query, key, kernel, first, module.config.rank, query_active, key_active)
