"""Parameters of a QK diagonalization."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from crosshead.dictionaries.base import DictionaryConfig
from crosshead.dictionaries.sparsity import Sparsity

__all__ = ["Config"]


class Config(DictionaryConfig):
    """Parameters of a QK diagonalization."""

    kind: Literal["qk_diagonal"] = "qk_diagonal"  # pyright: ignore[reportIncompatibleVariableOverride]
    layers: tuple[int]  # pyright: ignore[reportIncompatibleVariableOverride]
    """The one layer whose heads it describes."""
    sparsity: Sparsity
    """Which features are active, on the query side and on the key side alike."""
    heads: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | Literal["all"] = "all"
    """Query heads that share the features, lowest first."""
    rank: Annotated[int, Field(gt=0)] = 1
    """r: dimensions of a feature's interaction."""
    position: Literal["rotary", "content", "rotated"] = "rotary"
    """Un-rotated queries and keys with a kernel of relative position, or with none; or rotated ones. All three are the
    same for models without rotary embedding."""
    kernel_frequencies: Annotated[int, Field(gt=0)] | Literal["all"] = "all"
    """Frequencies that a feature's kernel keeps, its strongest ones; in the first 30% of training it has all."""
    target: Literal["scores", "pattern", "both"] = "both"
    """Centred scores (squared error), the attention pattern (KL divergence), or both."""
    pattern_weight: Annotated[float, Field(ge=0)] = 0.3
    """Of the KL divergence, in nats, where both are trained."""
    first_weight: Annotated[float, Field(ge=0)] = 0.1
    """Of the squared error of the beginning-of-text key's score over the mean of the others, in units of variance."""
    input: Literal["heads", "resid"] = "heads"
    """Read the heads' queries and keys, or the layer's normed residual stream on both sides."""
    base: Literal["none", "mean"] = "none"
    """What features add to: nothing, or the exact scores of the mean query and the mean key."""
    scale_multiplier: Annotated[float, Field(gt=0)] = 30.0
    """Learning rate of the strengths c over that of the encoders."""
    kernel_multiplier: Annotated[float, Field(gt=0)] = 2.0
    """Learning rate of the kernels and of the beginning-of-text key over that of the encoders."""
    start_queries: Annotated[int, Field(gt=0)] = 192
    """Queries, with all their keys, that the strengths are solved for at the start."""

    @field_validator("heads")
    @classmethod
    def _heads_ascend(cls, heads: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if not isinstance(heads, str) and list(heads) != sorted(set(heads)):
            raise ValueError(f"got heads {list(heads)}; give numbers from 0 on, lowest first, each once, or all")
        return heads

    @model_validator(mode="after")
    def _kernel_has_frequencies(self) -> "Config":
        if self.position != "rotary" and self.kernel_frequencies != "all":
            raise ValueError(f"kernel_frequencies applies to position: rotary, got position: {self.position}; "
                             "write kernel_frequencies: all")  # fmt: skip
        return self
