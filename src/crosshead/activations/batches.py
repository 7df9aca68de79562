"""Training and evaluation batches out of activations, as a pure function of seed and step."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from crosshead.activations.cache import ActivationSource
from crosshead.activations.controls import Control, make_control, sites_read
from crosshead.dictionaries.base import Batch, Site

__all__ = ["Batches"]


class Batches:
    """Batches of whole contexts from one split.

    ``at(step)`` walks through the split in an order shuffled anew every epoch, so training can go on at any step;
    ``all()`` goes through it once in order. The batch after the one asked for is read ahead in a thread.

    A ``control`` breaks what ties layers together: every site above the lowest layer holds other rows than its own, see
    ``controls``. Which ones is a function of seed and step as well.
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
        cache.check_sites(sites_read(sites, control, cache.lowest_layer))
        if contexts_per_batch < 1:
            raise ValueError(f"contexts_per_batch={contexts_per_batch}; give at least 1")
        self.cache = cache
        self.split = split
        self.sites = tuple(sites)
        self.contexts_per_batch = contexts_per_batch
        self.seed = seed
        self.device = device
        self.n_contexts = cache.n_contexts(split)
        self._control = make_control(control, cache, split, self.sites, contexts_per_batch)
        self._order: tuple[int, Tensor] | None = None
        # Everything is read in this thread: a batch must not depend on whether it was read ahead, to the last bit.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="crosshead-batches")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def __len__(self) -> int:
        """Number of batches that ``all`` yields."""
        return -(-self.n_contexts // self.contexts_per_batch)

    @property
    def control_detail(self) -> dict[str, float] | None:
        """What a record says about the control on this split: of matched_tokens the shares of its donors."""
        return self._control.detail

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
        batch = self.cache.read(self.split, contexts, self._control.reads, device=self.device)
        return self._control.apply(batch, contexts, _generator(self.seed if seed is None else seed, 1, number))


def _generator(*key: int) -> torch.Generator:
    """Random numbers that depend on the key and nothing else."""
    seed = 0
    for part in key:
        # A multiplicative hash, so that neighbouring keys share no stream.
        seed = ((seed ^ (part + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63
    return torch.Generator().manual_seed(seed)
