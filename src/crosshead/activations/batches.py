"""Training and evaluation batches out of activations, as a pure function of seed and step."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from crosshead.activations.cache import ActivationSource
from crosshead.dictionaries.base import Batch, Site

__all__ = ["Batches", "Control"]

Control = Literal["none", "other_contexts"]

_PER_POSITION = ("v", "resid_in", "attn_out", "mlp_in", "mlp_out", "resid_out")


class Batches:
    """Batches of whole contexts from one split.

    ``at(step)`` walks through the split in an order shuffled anew every epoch, so training can go on at any step;
    ``all()`` goes through it once in order. The batch after the one asked for is read ahead in a thread.

    ``control: other_contexts`` (after methods 4, control i; design choice) breaks what ties layers together: at every
    site above the lowest layer, each counted position holds the row of some counted position of another context. What
    the layers then still share is their statistics, not their inputs.
    """

    def __init__(
        self,
        cache: ActivationSource,
        split: str,
        sites: Sequence[Site],
        contexts_per_batch: int,
        seed: int,
        control: Control = "none",
        device: torch.device | str = "cpu",
    ):
        cache.check_sites(sites)
        if contexts_per_batch < 1:
            raise ValueError(f"contexts_per_batch={contexts_per_batch}; give at least 1")
        self.cache = cache
        self.split = split
        self.sites = tuple(sites)
        self.contexts_per_batch = contexts_per_batch
        self.seed = seed
        self.device = device
        self.n_contexts = cache.n_contexts(split)
        lowest = min((site.layer for site in sites), default=0)
        self._moved = () if control == "none" else tuple(site for site in self.sites if site.layer > lowest)
        self._check_control(control)
        self._order: tuple[int, Tensor] | None = None
        # Everything is read in this thread: a batch must not depend on whether it was read ahead, to the last bit.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="crosshead-batches")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def __len__(self) -> int:
        """Number of batches that ``all`` yields."""
        return -(-self.n_contexts // self.contexts_per_batch)

    def at(self, step: int) -> Batch:
        """The batch of a training step: the same for the same seed, whatever was asked for before."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._reader.submit(self._read_step, step)
        batch = self._ahead[1].result()
        self._ahead = step + 1, self._reader.submit(self._read_step, step + 1)
        return batch

    def all(self) -> Iterator[Batch]:
        """Every context once, in order; the last batch may be smaller."""
        starts = range(0, self.n_contexts, self.contexts_per_batch)
        groups = [list(range(start, min(start + self.contexts_per_batch, self.n_contexts))) for start in starts]
        ahead = self._reader.submit(self._read, groups[0], 0)
        for i in range(len(groups)):
            batch = ahead.result()
            if i + 1 < len(groups):
                ahead = self._reader.submit(self._read, groups[i + 1], i + 1)
            yield batch

    def sample(self, n_contexts: int, seed: int) -> list[Batch]:
        """Some contexts drawn without repetition, in batches; all of them where the split holds no more."""
        drawn = torch.randperm(self.n_contexts, generator=_generator(seed, 2)).tolist()[:n_contexts]
        groups = [
            drawn[start : start + self.contexts_per_batch] for start in range(0, len(drawn), self.contexts_per_batch)
        ]
        return [self._reader.submit(self._read, group, i, seed).result() for i, group in enumerate(groups)]

    def _read_step(self, step: int) -> Batch:
        first = step * self.contexts_per_batch
        return self._read([self._context(place) for place in range(first, first + self.contexts_per_batch)], step)

    def _context(self, place: int) -> int:
        """The context at a place of the endless shuffled sequence of epochs."""
        epoch, offset = divmod(place, self.n_contexts)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, torch.randperm(self.n_contexts, generator=_generator(self.seed, 0, epoch))
        return int(self._order[1][offset])

    def _read(self, contexts: list[int], number: int, seed: int | None = None) -> Batch:
        batch = self.cache.read(self.split, contexts, self.sites, device=self.device)
        if not self._moved:
            return batch
        generator = _generator(self.seed if seed is None else seed, 1, number)
        sites = dict(batch.sites)
        for layer in sorted({site.layer for site in self._moved}):
            moved = [site for site in self._moved if site.layer == layer]
            sites |= self._from_other_contexts(batch, contexts, moved, generator)
        return Batch(sites, batch.mask, batch.tokens)

    def _from_other_contexts(
        self, batch: Batch, contexts: list[int], sites: list[Site], generator: torch.Generator
    ) -> dict[Site, Tensor]:
        """Replace every counted row of one layer by a row of a context that is not in the batch."""
        here = set(contexts)
        others = torch.randperm(self.n_contexts, generator=generator).tolist()
        donors = [context for context in others if context not in here][: len(contexts)]
        donated = self.cache.read(self.split, donors, sites, device=self.device)
        n_counted = int(donated.mask.sum())
        # Each donated row is used at most once as long as there are enough, so the rows keep their distribution.
        picks = torch.cat([torch.randperm(n_counted, generator=generator)
                           for _ in range(-(-batch.n_counted // n_counted))])  # fmt: skip
        picks = picks[: batch.n_counted].to(batch.mask.device)
        replaced = {}
        for site in sites:
            # Positions before heads, so that the mask picks rows.
            rows = batch[site].movedim(-2, 1).clone()
            rows[batch.mask] = donated[site].movedim(-2, 1)[donated.mask][picks]
            replaced[site] = rows.movedim(1, -2).contiguous()
        return replaced

    def _check_control(self, control: Control) -> None:
        if control == "none":
            return
        unfit = [site for site in self._moved if site.name not in _PER_POSITION]
        if unfit:
            raise ValueError(f"control other_contexts moves single rows, which {unfit[0]} does not survive; "
                             "give it to dictionaries that read only other sites above their lowest layer")  # fmt: skip
        if not self._moved:
            raise ValueError("control other_contexts needs sites of at least two layers; "
                             "give the run a second layer or control: none")  # fmt: skip
        if self.n_contexts <= self.contexts_per_batch:
            raise ValueError(f"control other_contexts needs more than contexts_per_batch={self.contexts_per_batch} "
                             f"contexts, {self.split} has {self.n_contexts}; lower contexts_per_batch")  # fmt: skip


def _generator(*key: int) -> torch.Generator:
    """Random numbers that depend on the key and nothing else."""
    seed = 0
    for part in key:
        # A multiplicative hash, so that neighbouring keys share no stream.
        seed = ((seed ^ (part + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63
    return torch.Generator().manual_seed(seed)
