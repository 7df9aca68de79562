"""The one-head null: how much a many-heads dictionary gains where every feature is known to have one head.

Shape legend: n contexts of a split, B of a batch, T positions, D = d_model.

In real activations a Top-1 multitoken transcoder is taken for the truth. The planted attention output of a context is
the Top-1 teacher's prediction of it plus noise: the teacher's residuals at the counted positions of another context, in
random order. Over a split every residual row is used exactly once, so the noise has the size and the distribution of
what the teacher does not explain, but nothing in the context predicts it. Inputs, patterns and values stay real.

An MTC and a Top-1 MTC trained on that target as on the real one show what spread over heads (participation ratio) and
what advantage in error (frontiers at equal L0) appear without any superposition. Real figures are evidence for it only
beyond these. The source asks for no null; design choice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.lib.format import open_memmap
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from crosshead.activations.cache import ActivationSource
from crosshead.analysis.evaluation import Evaluation
from crosshead.dictionaries.base import Batch, Dictionary, Site
from crosshead.io.files import atomic_path
from crosshead.training.runs import Run

__all__ = ["SEED_OFFSET", "NullConfig", "PlantedSource", "null_row", "planted_target"]

SEED_OFFSET = 1_000
"""Added to a student's seed: none begins where its teacher did, which would favour it."""


class NullConfig(BaseModel):
    """Parameters of the one-head null."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str
    """Trained Top-1 run whose prediction of the attention output is the planted truth."""
    runs: Annotated[tuple[str, ...], Field(min_length=1)]
    """Runs that are trained once more, on the planted target: Top-1 MTCs and ones with more heads."""

    @field_validator("runs")
    @classmethod
    def _each_once(cls, runs: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(runs)) < len(runs):
            raise ValueError(f"got {list(runs)}; give each run once")
        return runs


class PlantedSource(ActivationSource):
    """A source of activations whose attention output at one layer is planted; everything else is the source's own.

    A split is planted once, when it is first read, into a memory-mapped file in ``home`` (4 n T D bytes); files that an
    earlier source of the same teacher, source and seed left there are taken as they are. Which context gives the
    residuals, and their order, depend on ``seed``, split and context only. Masked positions keep the source's own
    attention output.
    ValueError unless the teacher predicts the attention output with one head per feature, and for a split of one
    context, which has no other to take residuals from.
    """

    def __init__(self, source: ActivationSource, teacher: Dictionary, home: Path, seed: int = 0):
        super().__init__(source.directory, source.manifest)
        heads = getattr(teacher.config, "heads_per_feature", None)
        names = [site.name for site in teacher.target_sites]
        if heads != 1 or names != ["attn_out"]:
            raise ValueError(f"the teacher is a {teacher.config.kind} with heads_per_feature {heads} that predicts "
                             f"{', '.join(names)}; name a Top-1 mtc run with target attn_out in "
                             "nulls.teacher")  # fmt: skip
        self.source, self.teacher, self.home, self.seed = source, teacher.eval(), home, seed
        (self.planted,) = teacher.target_sites
        self._donors: dict[str, list[int]] = {}
        self._targets: dict[str, np.ndarray] = {}

    def n_contexts(self, split: str) -> int:
        return self.source.n_contexts(split)

    def domains(self, split: str) -> list[str]:
        return self.source.domains(split)

    def tokens(self, split: str, indices: Sequence[int]) -> Tensor:
        return self.source.tokens(split, indices)

    def stored(self, split: str, indices: Sequence[int], sites: Sequence[Site]) -> dict[Site, Tensor]:
        """The source's own; ``read`` plants."""
        return self.source.stored(split, indices, sites)

    def rows(
        self, split: str, contexts: np.ndarray, positions: np.ndarray, sites: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "n *widths"]]:
        """See ``ActivationSource.rows``. ValueError for the planted site: it is planted context by context."""
        if self.planted in sites:
            raise ValueError(f"site {self.planted} is planted and has no single rows; name runs without a control")
        return self.source.rows(split, contexts, positions, sites)

    def read(
        self, split: str, indices: Sequence[int], sites: Sequence[Site], *, device: torch.device | str = "cpu"
    ) -> Batch:
        """See ``ActivationSource.read``."""
        if self.planted not in sites:
            return self.source.read(split, indices, sites, device=device)
        others = [site for site in sites if site != self.planted]
        batch = self.source.read(split, indices, others, device=device)
        target = torch.from_numpy(self._target(split)[list(indices)]).to(device)
        return Batch({**batch.sites, self.planted: target}, batch.mask, batch.tokens)

    def _target(self, split: str) -> Float[np.ndarray, "n T D"]:
        if split not in self._targets:
            self._targets[split] = np.load(self.plant(split), mmap_mode="r")
        return self._targets[split]

    @torch.no_grad()
    def plant(self, split: str) -> Path:
        """The file of a split, written now unless it is there.

        One context after the other, so that no context depends on those it is read with.
        """
        file = self.home / f"planted-{split}-{self.seed}.npy"
        if file.exists():
            return file
        shape = (self.n_contexts(split), self.context_length, self.dims.d_model)
        device, donors = next(self.teacher.parameters()).device, [self.donor(split, c) for c in range(shape[0])]
        with atomic_path(file) as temporary:
            target = open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            for index, donor in enumerate(donors):
                batch, donated = (self.source.read(split, [c], self.teacher.sites, device=device)
                                  for c in (index, donor))  # fmt: skip
                order = self._order(split, index, batch.n_counted)
                target[index] = planted_target(self.teacher, batch, donated, [order])[0].cpu().numpy()
            target.flush()
        return file

    def donor(self, split: str, index: int) -> int:
        """The context whose residuals a context gets: never its own, and each gives to exactly one."""
        if split not in self._donors:
            n_contexts = self.n_contexts(split)
            if n_contexts < 2:
                raise ValueError(f"{split} has one context, but residuals come from another one; "
                                 "raise corpus.train_contexts and corpus.heldout_contexts")  # fmt: skip
            circle = torch.randperm(n_contexts, generator=self._generator(split, 0)).tolist()
            following = dict(zip(circle, circle[1:] + circle[:1], strict=True))
            self._donors[split] = [following[context] for context in range(n_contexts)]
        return self._donors[split][index]

    def _order(self, split: str, index: int, n_counted: int) -> Tensor:
        return torch.randperm(n_counted, generator=self._generator(split, 1 + index))

    def _generator(self, split: str, number: int) -> torch.Generator:
        key = int.from_bytes(split.encode()[:4], "little")
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + key) * 1_000_003 + number) % 2**63)


@torch.no_grad()
def planted_target(
    teacher: Dictionary, batch: Batch, donated: Batch, orders: Sequence[Tensor]
) -> Float[Tensor, "B T D"]:
    """The teacher's raw prediction of ``batch`` plus its residuals of ``donated``, context by context.

    ``orders[c]`` says which counted row of the c-th donated context each counted position gets; both have equally many.
    Masked positions keep the true activation.
    """
    (site,) = teacher.target_sites
    prediction = teacher.reconstruct(batch)[site]
    residuals = donated[site].to(prediction.dtype) - teacher.reconstruct(donated)[site]
    planted = batch[site].to(prediction.dtype).clone()
    for c, order in enumerate(orders):
        noise = residuals[c][donated.mask[c]][order.to(residuals.device)]
        planted[c, batch.mask[c]] = prediction[c][batch.mask[c]] + noise
    return planted


def null_row(run: Run, module: Dictionary, evaluation: Evaluation) -> dict[str, Any]:
    """One dictionary trained on the planted target, in the form of a run record as ``compare_series`` reads it."""
    spread = evaluation.superposition
    return {
        "run": run.name,
        "series": run.series,
        "heads_per_feature": getattr(module.config, "heads_per_feature", None),
        "k": getattr(module.config.sparsity, "k", None),
        "seed": run.seed,
        "l0": evaluation.l0,
        "normalised_mse": evaluation.normalised_mse,
        "participation_ratio_mean": None if spread is None else spread.participation_ratio_mean,
        "participation_ratio_median": None if spread is None else spread.participation_ratio_median,
        "identity_share": None if spread is None else spread.identity_share,
        "dead_fraction": evaluation.dead_fraction,
        "pruned": [row.model_dump(mode="json") for row in evaluation.pruned],
        "n_tokens": evaluation.n_tokens,
        "evaluation": {
            "normalised_mse": evaluation.normalised_mse,
            "context_squared_error": evaluation.context_squared_error,
            "context_variance": evaluation.context_variance,
        },
    }
