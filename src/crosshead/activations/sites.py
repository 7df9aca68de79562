"""Which tensors stand behind a list of sites, and their shapes."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from crosshead.dictionaries.base import ModelDims, Site
from crosshead.maths.patterns import AttentionSpec, attention_patterns

__all__ = ["recompute_patterns", "site_shape", "stored_sites"]


def site_shape(site: Site, dims: ModelDims, length: int) -> tuple[int, ...]:
    """Shape of one context's tensor at a site."""
    match site.name:
        case "q":
            return dims.n_heads, length, dims.head_dim
        case "k" | "v" | "v_shared_input":
            return dims.n_kv_heads, length, dims.head_dim
        case "pattern":
            return dims.n_heads, length, length
        case _:
            return length, dims.d_model


def stored_sites(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The sites with every pattern replaced by the q and k it is recomputed from; sorted, without repetition."""
    stored: set[Site] = set()
    for site in sites:
        stored |= {Site(site.layer, "q"), Site(site.layer, "k")} if site.name == "pattern" else {site}
    return tuple(sorted(stored))


def recompute_patterns(
    found: Mapping[Site, Tensor], sites: Iterable[Site], specs: Mapping[int, AttentionSpec]
) -> dict[Site, Tensor]:
    """The sites asked for, in their order, out of stored ones; patterns are float32, on the device of q and k."""
    return {
        site: attention_patterns(
            found[Site(site.layer, "q")].float(), found[Site(site.layer, "k")].float(), specs[site.layer]
        )
        if site.name == "pattern"
        else found[site]
        for site in sites
    }
