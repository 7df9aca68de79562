"""What a layer's softmax needs beside features: rotary tables, scale, soft-cap, window, sinks - kept with the weights.

Shape legend: B contexts, H query heads, T positions, E head width, R rotated coordinates, M = E // 2 frequencies.

Features read un-rotated queries and keys, because a direction of rotated ones means something else at every position;
relative position comes back as a kernel, a sum of cos(w_m d) and sin(w_m d) over the model's own frequencies, which are
rows of its tables: position d's row holds cos(w_m d).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crosshead.maths.patterns import AttentionSpec, undo_rotation

__all__ = ["Positions"]

Tables = tuple[Float[Tensor, "T R"], Float[Tensor, "T R"]]


class Positions(nn.Module):
    """Buffers only. ``set_`` fills them from an attention spec and rotary tables; they are saved with the weights."""

    cos: Tensor
    sin: Tensor
    sinks: Tensor
    numbers: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.zeros(0, 0))
        self.register_buffer("sinks", torch.zeros(0))
        # scale (0: not set), soft-cap (0: none), window (0: none), interleaved
        self.register_buffer("numbers", torch.zeros(4, dtype=torch.float64))

    @torch.no_grad()
    def set_(self, spec: AttentionSpec, tables: Tables | None) -> None:
        """``tables``: the cos and sin that undo the layer's rotation; None where q and k are not rotated."""
        if tables is not None:
            self.cos, self.sin = (table.float().clone().to(self.numbers.device) for table in tables)
        if spec.sinks is not None:
            self.sinks = torch.tensor(spec.sinks, device=self.numbers.device)
        numbers = (spec.scale, spec.softcap or 0.0, spec.sliding_window or 0, float(spec.rotary_interleaved))
        self.numbers.copy_(torch.tensor(numbers, dtype=torch.float64))

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Tables have as many rows as the contexts that they were made for: take any shape."""
        for name in ("cos", "sin", "sinks"):
            if prefix + name in state_dict:
                buffer = getattr(self, name)
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @property
    def ready(self) -> bool:
        """Whether ``set_`` was called."""
        return bool(self.numbers[0] != 0)

    @property
    def rotates(self) -> bool:
        """Whether the layer rotates q and k."""
        return self.cos.numel() > 0

    @property
    def scale(self) -> float:
        """Multiplies q.k before the soft-cap."""
        return float(self.numbers[0])

    def check_length(self, n_positions: int) -> None:
        """ValueError for contexts longer than the tables."""
        if self.rotates and n_positions > len(self.cos):
            raise ValueError(f"the rotary tables hold {len(self.cos)} positions, the context has {n_positions}; use "
                             "shorter contexts, or train on longer ones (corpus.context_length)")  # fmt: skip

    def unrotated(self, x: Float[Tensor, "B heads T E"]) -> Float[Tensor, "B heads T E"]:
        """Queries or keys before the rotary embedding."""
        if not self.rotates:
            return x
        self.check_length(x.shape[-2])
        cos, sin = self._tables(x)
        return undo_rotation(x, cos, sin, interleaved=bool(self.numbers[3]))

    def rotated(self, x: Float[Tensor, "*heads T E"]) -> Float[Tensor, "*heads T E"]:
        """The rotary embedding itself, ``unrotated`` backwards."""
        if not self.rotates:
            return x
        self.check_length(x.shape[-2])
        cos, sin = self._tables(x)
        # The inverse with -sin divides by cos^2 + sin^2, which is not 1 where a factor is folded into the tables.
        return self._scaled(undo_rotation(x, cos, -sin, interleaved=bool(self.numbers[3])), cos, sin)

    def _scaled(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = cos.shape[-1]
        return torch.cat((x[..., :width] * (cos**2 + sin**2), x[..., width:]), dim=-1)

    def _tables(self, x: Tensor) -> Tables:
        n_positions = x.shape[-2]
        return self.cos[:n_positions].to(x), self.sin[:n_positions].to(x)

    def pairs_of_coordinates(self) -> tuple[Tensor, Tensor]:
        """First and second coordinate of every frequency's plane."""
        n_rotated = self.cos.shape[-1]
        first = torch.arange(n_rotated // 2, device=self.cos.device)
        return (2 * first, 2 * first + 1) if bool(self.numbers[3]) else (first, first + n_rotated // 2)

    def basis(self, width: int) -> Float[Tensor, "D Q"]:
        """cos(w_m d), sin(w_m d) for M = width // 2 frequencies and 1, at every distance; Q = 2 M + 1.

        Columns of frequencies that the layer does not have are zero, and the constant is where a coordinate passes
        unrotated. One row where nothing is rotated.
        """
        n_frequencies = width // 2
        if not self.rotates:
            basis = self.numbers.new_zeros(1, 2 * n_frequencies + 1)
            basis[:, -1] = 1.0
            return basis.float()
        first = self.pairs_of_coordinates()[0]
        cos, sin = self.cos[:, first].double(), self.sin[:, first].double()
        size = (cos**2 + sin**2).sqrt()
        basis = self.cos.new_zeros(len(self.cos), 2 * n_frequencies + 1)
        basis[:, : len(first)] = (cos / size).float()
        basis[:, n_frequencies : n_frequencies + len(first)] = (sin / size).float()
        basis[:, -1] = float(self.cos.shape[-1] < width)
        return basis

    def kernel_of(self, a: Float[Tensor, "n E"], b: Float[Tensor, "n E"]) -> Float[Tensor, "n Q"]:
        """Coefficients of a^T Rot_d b in ``basis``: what the interaction of two read-out vectors is at distance d.

        A query at t and a key at s, un-rotated a and b, score a^T Rot_(s - t) b; with d = t - s.
        """
        width = a.shape[-1]
        n_frequencies = width // 2
        coefficients = a.new_zeros(len(a), 2 * n_frequencies + 1)
        if not self.rotates:
            coefficients[:, -1] = (a * b).sum(-1)
            return coefficients
        x, y = self.pairs_of_coordinates()
        a_x, a_y, b_x, b_y = a[:, x], a[:, y], b[:, x], b[:, y]
        size = (self.cos[0, x] ** 2 + self.sin[0, x] ** 2).to(a)
        coefficients[:, : len(x)] = (a_x * b_x + a_y * b_y) * size
        coefficients[:, n_frequencies : n_frequencies + len(x)] = (a_x * b_y - a_y * b_x) * size
        n_rotated = self.cos.shape[-1]
        coefficients[:, -1] = (a[:, n_rotated:] * b[:, n_rotated:]).sum(-1)
        return coefficients

    def allowed(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
        """Pairs of counted positions that the layer's mask lets through; never the beginning-of-text key."""
        place = torch.arange(mask.shape[1], device=mask.device)
        distance = place[:, None] - place
        within = distance >= 0
        if window := int(self.numbers[2]):
            within &= distance < window
        return (within & mask[:, :, None] & mask[:, None, :])[:, None]

    def allowed_with_first(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
        """The same with the beginning-of-text key where the window reaches it."""
        place = torch.arange(mask.shape[1], device=mask.device)
        window = int(self.numbers[2])
        allowed = self.allowed(mask)
        allowed[:, 0, :, 0] = mask & (place < window) if window else mask
        return allowed

    def log_pattern(
        self, scores: Float[Tensor, "B G T T"], allowed: Bool[Tensor, "B 1 T T"], heads: Tensor
    ) -> Float[Tensor, "B G T T"]:
        """Log of the softmax over ``allowed`` keys, soft-cap and sinks applied; 0 at keys that are not allowed.

        Queries without an allowed key get 0 everywhere.
        """
        if cap := float(self.numbers[1]):
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~allowed, -1e30)
        total = scores.logsumexp(-1, keepdim=True)
        if len(self.sinks):
            total = torch.logaddexp(total, self.sinks[heads].to(scores)[None, :, None, None])
        return (scores - total).masked_fill(~allowed, 0.0)
