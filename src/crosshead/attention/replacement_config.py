"""Parameters of attention replacement layers, and the forms they come in."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crosshead.dictionaries.base import DictionaryConfig
from crosshead.dictionaries.sparsity import Sparsity

__all__ = ["Combined", "Config", "Entropy", "Gates", "NoPatternPenalty", "PatternPenalty", "Plain", "Power", "RankOne",
           "Variant"]  # fmt: skip

Share = Annotated[float, Field(ge=0, le=1)]
Coefficient = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Plain(_Part):
    """Every head has its own queries, keys and values, all of width e (the source)."""

    kind: Literal["plain"] = "plain"


class RankOne(_Part):
    """Heads that write one direction each, the strongest at every position only; groups of them share queries and keys.

    After He et al., low-rank sparse attention (2025).
    """

    kind: Literal["rank_one"] = "rank_one"
    groups: Annotated[int, Field(gt=0)]
    """QK groups; their number divides that of the heads."""
    active: Annotated[int, Field(gt=0)]
    """Heads that write at a position: those that would write most."""
    anneal_from: Annotated[float, Field(ge=1)] = 4.0
    """Training starts with this multiple of ``active``."""
    anneal_fraction: Share = 0.3
    """Share of training over which the multiple falls to 1."""


class Combined(_Part):
    """Sparse QK features say where, sparse features of single positions say what (the source's proposed next step).

    Every group of features is moved by one pattern, as in a Top-1 multitoken transcoder. Its scores are the sum over
    ``head_dim`` rank-1 QK features of u_i(t) v_i(s) cos(w_i (t - s) + phi_i): half of them of content alone (w = 0).
    """

    kind: Literal["combined"] = "combined"
    groups: Annotated[int, Field(gt=0)]
    """Patterns; their number divides that of the features."""
    qk_active: Annotated[int, Field(gt=0)]
    """QK features of a group that are active at a position, on either side; at most ``head_dim``."""
    sparsity: Sparsity
    """Which features are active at a position, on the key side."""


Variant = Annotated[Plain | RankOne | Combined, Field(discriminator="kind")]


class NoPatternPenalty(_Part):
    """Patterns are free."""

    kind: Literal["none"] = "none"


class Entropy(_Part):
    """On the entropy of pattern rows, in nats: mean over counted positions and heads."""

    kind: Literal["entropy"] = "entropy"
    coefficient: Coefficient


class Power(_Part):
    """On sum_s A(t,s)^p, 1 for a row with one key: mean over counted positions and heads.

    With p = 1 it would be constant: the L1 norm of a softmax row is 1.
    """

    kind: Literal["power"] = "power"
    coefficient: Coefficient
    p: Annotated[float, Field(gt=0, lt=1)] = 0.5


PatternPenalty = Annotated[NoPatternPenalty | Entropy | Power, Field(discriminator="kind")]


class Gates(_Part):
    """A factor from 0 to 1 on what every head writes. A gate that reaches 0 stays there: the head is dead."""

    coefficient: Coefficient
    """On sum_j gate_j ||W_V,j|| ||W_O,j||, a bound on what head j writes: shrinking a gate and growing its maps gains
    nothing."""
    start_fraction: Share = 0.1
    """Share of training before the coefficient rises."""
    warmup_fraction: Share = 0.2
    """Share of training over which it rises linearly."""
    multiplier: Annotated[float, Field(gt=0)] = 5.0
    """Learning rate of the gates over the run's own."""


class Config(DictionaryConfig):
    """Parameters of an attention replacement layer."""

    kind: Literal["replacement"] = "replacement"  # pyright: ignore[reportIncompatibleVariableOverride]
    layers: tuple[int]  # pyright: ignore[reportIncompatibleVariableOverride]
    """The one layer whose attention it replaces."""
    head_dim: Annotated[int, Field(gt=0, multiple_of=2)]
    """e, width of a head's queries and keys (plain: of its values too); combined: QK features of a group."""
    variant: Variant = Plain()
    """What a head is."""
    start: Literal["random", "base_qk"] = "random"
    """Queries and keys: random, or copies of the base layer's own, dealt out over the heads."""
    lambda_qk: Coefficient = 0.0
    """On 1/2 (||W_Q||_F^2 + ||W_K||_F^2), summed over groups: its least value over all factors of a QK form is the
    form's nuclear norm."""
    lambda_ov: Coefficient = 0.0
    """The same of values and outputs, summed over heads."""
    pattern: PatternPenalty = NoPatternPenalty()
    """What concentrates patterns on few keys."""
    gates: Gates | None = None
    """What lets whole heads die; null: no gates."""
    warmup_fraction: Share = 0.1
    """Coefficients of the nuclear norms and of the patterns rise linearly over this share of training."""
    terms_multiplier: Annotated[float, Field(gt=0)] = 5.0
    """Learning rate of biases, phases and what stands for the beginning-of-text token, over that of the maps."""
    patterns_mib: Annotated[float, Field(gt=0)] = 32.0
    """Largest [B, heads, T, T] that is in memory at once, in MiB, at least one head; changes roundings only."""

    @model_validator(mode="after")
    def _numbers_fit(self) -> "Config":
        variant = self.variant
        if isinstance(variant, RankOne | Combined) and self.features % variant.groups:
            raise ValueError(f"variant.groups={variant.groups} does not divide features={self.features}; "
                             "choose a divisor")  # fmt: skip
        if isinstance(variant, RankOne) and variant.active > self.features:
            raise ValueError(f"variant.active={variant.active} exceeds features={self.features}; lower it")
        if isinstance(variant, Combined):
            if variant.qk_active > self.head_dim:
                raise ValueError(f"variant.qk_active={variant.qk_active} exceeds head_dim={self.head_dim}; lower it")
            if self.start != "random":
                raise ValueError("variant.kind: combined has QK features of its own and starts from start: random; "
                                 f"got {self.start!r}, correct it")  # fmt: skip
        return self

    @property
    def groups(self) -> int:
        """G, the number of patterns."""
        return self.features if isinstance(self.variant, Plain) else self.variant.groups
