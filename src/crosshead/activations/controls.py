"""What a control puts in the place of the rows of upper layers: all above a run's lowest.

After methods 4, the controls of the two-layer value SAE (design choice). A two-layer advantage says that the layers
share features only if it is larger than what each of these leaves of it:

- ``other_contexts``: rows of other contexts at random positions. The layers share their statistics and nothing else;
- ``matched_tokens``: rows of other contexts at the same current and previous token (``matching``). What remains is
  shared by way of the tokens alone;
- ``shared_input``: v_shared_input in place of v: the layer's values, had it read the residual stream of the harvest's
  lowest layer (``derived``). What remains is shared because layers of one stream read nearly the same input. A run of
  the upper layer alone reads it too: its sweep is the other summand of that comparison.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from crosshead.activations.cache import ActivationSource
from crosshead.activations.matching import TokenMatches
from crosshead.dictionaries.base import Batch, Site

__all__ = ["BatchControl", "Control", "make_control", "sites_read"]

Control = Literal["none", "other_contexts", "matched_tokens", "shared_input"]

_PER_POSITION = ("v", "v_shared_input", "resid_in", "attn_out", "mlp_in", "mlp_out", "resid_out")


def sites_read(sites: Sequence[Site], control: Control, lowest: int) -> tuple[Site, ...]:
    """The sites that a run of a dictionary that asks for ``sites`` reads from a cache, under a control.

    Its own in any case, because splicing reads contexts as they are, and those that the control reads in their place.
    ``lowest`` is the lowest layer of the harvest.
    """
    if control != "shared_input":
        return tuple(sites)
    return tuple(dict.fromkeys((*sites, *_stand_ins(sites, lowest).values())))


def _upper(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites of all layers above the lowest."""
    lowest = min((site.layer for site in sites), default=0)
    return tuple(site for site in sites if site.layer > lowest)


def _stand_ins(sites: Sequence[Site], lowest: int) -> dict[Site, Site]:
    """What shared_input reads for the values of layers above the harvest's lowest."""
    return {site: Site(site.layer, "v_shared_input") for site in sites if site.name == "v" and site.layer > lowest}


class BatchControl(ABC):
    """What is read for a batch and what is then done to it."""

    def __init__(self, sites: Sequence[Site]):
        self.sites = tuple(sites)

    @property
    def reads(self) -> tuple[Site, ...]:
        """The sites that a batch is read with."""
        return self.sites

    @property
    def detail(self) -> dict[str, float] | None:
        """What a run's record says about the control on this split."""
        return None

    @abstractmethod
    def apply(self, batch: Batch, contexts: Sequence[int], generator: torch.Generator) -> Batch:
        """The batch of the given contexts as the dictionary sees it; every random choice comes from ``generator``."""


class _Untouched(BatchControl):
    """``none``."""

    def apply(self, batch: Batch, contexts: Sequence[int], generator: torch.Generator) -> Batch:
        return batch


class _SharedInput(BatchControl):
    """``shared_input``: another site of the same positions, under the name of the one that was asked for."""

    def __init__(self, cache: ActivationSource, sites: Sequence[Site]):
        super().__init__(sites)
        lowest = cache.lowest_layer
        unfit = [site for site in sites if site.layer > lowest and site.name != "v"]
        if unfit:
            raise ValueError(f"control shared_input knows values only, the run reads {unfit[0]}; "
                             "give it to dictionaries that read v alone above the harvest's lowest layer")  # fmt: skip
        self._stand_ins = _stand_ins(sites, lowest)
        if not self._stand_ins:
            raise ValueError(f"control shared_input: v_shared_input is made of the residual input of layer {lowest}, "
                             "the lowest in harvest.sites, and the run reads no values above it; give the run a higher "
                             "layer or control: none")  # fmt: skip

    @property
    def reads(self) -> tuple[Site, ...]:
        return tuple(self._stand_ins.get(site, site) for site in self.sites)

    def apply(self, batch: Batch, contexts: Sequence[int], generator: torch.Generator) -> Batch:
        return Batch({site: batch[read] for site, read in zip(self.sites, self.reads, strict=True)},
                     batch.mask, batch.tokens)  # fmt: skip


class _Moved(BatchControl):
    """Rows of other contexts; each layer's sites move together, each layer by itself."""

    def __init__(self, control: Control, sites: Sequence[Site]):
        super().__init__(sites)
        moved = _upper(sites)
        unfit = [site for site in moved if site.name not in _PER_POSITION]
        if unfit:
            raise ValueError(f"control {control} moves single rows, which {unfit[0]} does not survive; "
                             "give it to dictionaries that read only other sites above their lowest layer")  # fmt: skip
        _check_layers(control, sites)
        self._by_layer = [[site for site in moved if site.layer == layer]
                          for layer in sorted({site.layer for site in moved})]  # fmt: skip

    def apply(self, batch: Batch, contexts: Sequence[int], generator: torch.Generator) -> Batch:
        sites = dict(batch.sites)
        for layer_sites in self._by_layer:
            donated = self.donated(batch, contexts, layer_sites, generator)
            sites |= {site: _with_rows(batch[site], batch.mask, donated(site)) for site in layer_sites}
        return Batch(sites, batch.mask, batch.tokens)

    @abstractmethod
    def donated(
        self, batch: Batch, contexts: Sequence[int], sites: list[Site], generator: torch.Generator
    ) -> Callable[[Site], Tensor]:
        """One layer's new rows [counted, *widths] by site, in the order of the batch's counted positions."""


class _OtherContexts(_Moved):
    """``other_contexts``: counted rows of contexts that are not in the batch, at random."""

    def __init__(self, cache: ActivationSource, split: str, sites: Sequence[Site], contexts_per_batch: int):
        super().__init__("other_contexts", sites)
        self._cache, self._split, self._n_contexts = cache, split, cache.n_contexts(split)
        if self._n_contexts <= contexts_per_batch:
            raise ValueError(f"control other_contexts needs more than contexts_per_batch={contexts_per_batch} "
                             f"contexts, {split} has {self._n_contexts}; lower contexts_per_batch")  # fmt: skip

    def donated(
        self, batch: Batch, contexts: Sequence[int], sites: list[Site], generator: torch.Generator
    ) -> Callable[[Site], Tensor]:
        here = set(contexts)
        others = torch.randperm(self._n_contexts, generator=generator).tolist()
        donors = [context for context in others if context not in here][: len(contexts)]
        donated = self._cache.read(self._split, donors, sites, device=batch.mask.device)
        n_counted = int(donated.mask.sum())
        # Each donated row is used at most once as long as there are enough, so the rows keep their distribution.
        picks = torch.cat([torch.randperm(n_counted, generator=generator)
                           for _ in range(-(-batch.n_counted // n_counted))])  # fmt: skip
        picks = picks[: batch.n_counted].to(batch.mask.device)
        return lambda site: donated[site].movedim(-2, 1)[donated.mask][picks]


class _MatchedTokens(_Moved):
    """``matched_tokens``: rows of other contexts at the same current and previous token, as far as there are any."""

    def __init__(self, cache: ActivationSource, split: str, sites: Sequence[Site]):
        super().__init__("matched_tokens", sites)
        self._cache, self._split = cache, split
        nothing = np.zeros(0, dtype=np.int64)
        cache.rows(split, nothing, nothing, _upper(sites))  # where rows cannot be read, say so now
        self._matches = TokenMatches(cache.tokens(split, range(cache.n_contexts(split))))

    @property
    def detail(self) -> dict[str, float]:
        """Shares of the split's counted positions by what their donors share."""
        return self._matches.shares()

    def donated(
        self, batch: Batch, contexts: Sequence[int], sites: list[Site], generator: torch.Generator
    ) -> Callable[[Site], Tensor]:
        places, positions = batch.mask.cpu().nonzero(as_tuple=True)
        donors = self._matches.draw(np.asarray(contexts)[places.numpy()], positions.numpy(), generator)
        found = self._cache.rows(self._split, donors.contexts, donors.positions, sites)
        return lambda site: found[site].to(batch.mask.device)


def _with_rows(tensor: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """A site's tensor with other rows at its counted positions."""
    # Positions before heads, so that the mask picks rows.
    changed = tensor.movedim(-2, 1).clone()
    changed[mask] = rows
    return changed.movedim(1, -2).contiguous()


def _check_layers(control: Control, sites: Sequence[Site]) -> None:
    if not _upper(sites):
        raise ValueError(f"control {control} needs sites of at least two layers; "
                         "give the run a second layer or control: none")  # fmt: skip


def make_control(
    control: Control, cache: ActivationSource, split: str, sites: Sequence[Site], contexts_per_batch: int
) -> BatchControl:
    """The control of that name over one split. ValueError where the sites or the split do not allow it."""
    match control:
        case "none":
            return _Untouched(sites)
        case "other_contexts":
            return _OtherContexts(cache, split, sites, contexts_per_batch)
        case "matched_tokens":
            return _MatchedTokens(cache, split, sites)
        case "shared_input":
            return _SharedInput(cache, sites)
