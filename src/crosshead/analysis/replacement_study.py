"""Parameters of the stage that looks into attention replacement layers, and the rows that it writes."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from crosshead.analysis.description_length import CodeConfig, DescriptionLength
from crosshead.training.runs import Run

__all__ = ["ReplacementsConfig", "code_row", "heads_row"]

Number = Annotated[int, Field(gt=0)]


class ReplacementsConfig(BaseModel):
    """Which runs are looked into, and on how much data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads_of: tuple[str, ...]
    """Replacement layers, under attention_runs, whose skip-trigram and induction heads are searched for."""
    codes_of: tuple[str, ...]
    """Runs whose description length is measured: replacement layers under attention_runs, multitoken transcoders and
    attention output SAEs under runs."""
    trigram_heads: Number = 10
    """Heads whose strongest pair of tokens is checked by intervention."""
    trigram_events: Number = 8
    """Places of each pair, on either split, at which what the head moves from the key is removed."""
    trigram_train_contexts: Number = 24
    """Training contexts that pairs are looked for in."""
    trigram_heldout_contexts: Number = 32
    """Held-out contexts that they are checked in."""
    sequences: Number = 4
    """Contexts of random tokens repeated once, for induction heads."""
    length: Annotated[int, Field(ge=4)] = 64
    """Random tokens in each before they repeat."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes the random tokens."""
    code: CodeConfig = CodeConfig()
    """How reconstructions are sent."""


def heads_row(run: Run, skip_trigrams: dict[str, Any], induction: dict[str, Any]) -> dict[str, Any]:
    """What was found among the heads of a run."""
    return {"run": run.name, "series": run.series, "seed": run.seed, "skip_trigrams": skip_trigrams,
            "induction": induction}  # fmt: skip


def code_row(run: Run, features: int, length: DescriptionLength) -> dict[str, Any]:
    """The description length of a run."""
    return {"run": run.name, "series": run.series, "architecture": run.kind, "seed": run.seed,
            "features": features} | length.model_dump(mode="json")  # fmt: skip
