"""Run the model with some of its activations replaced by others."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.sites import site_shape
from crosshead.activations.taps import check_tokens, tapped
from crosshead.dictionaries.base import Site

__all__ = ["splice"]


@torch.no_grad()
def splice(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    replacements: Mapping[Site, Tensor],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T V"]:
    """Logits of the model run with each site overwritten by its replacement where ``mask`` is True.

    Where the mask is False the model's own activation stays: what it has become under earlier replacements. q, k and v
    are replaced inside the attention interface, so that the layer attends with them; the other sites by module hooks.
    ValueError for patterns (replace q and k), a replacement of another shape, or what ``capture`` refuses.
    """
    check_tokens(model, tokens)
    if mask.shape != tokens.shape or mask.dtype != torch.bool:
        raise ValueError(f"the mask must be boolean of shape {tuple(tokens.shape)} like the tokens, "
                         f"got {mask.dtype} of shape {tuple(mask.shape)}")  # fmt: skip
    for site, replacement in replacements.items():
        expected = (tokens.shape[0], *site_shape(site, model.dims, tokens.shape[1]))
        if replacement.shape != expected:
            raise ValueError(f"the replacement of site {site} has shape {tuple(replacement.shape)}, "
                             f"the site has {expected}; pass raw activations in the site's own shape")  # fmt: skip
    mask = mask.to(model.device)

    def overwrite(site: Site, tensor: Tensor) -> Tensor:
        replacement = replacements[site].to(tensor)
        where = mask[:, None, :, None] if replacement.ndim == 4 else mask[:, :, None]
        return torch.where(where, replacement, tensor.view(replacement.shape)).view(tensor.shape)

    with tapped(model, list(replacements), overwrite):
        return model.model(tokens.to(model.device), use_cache=False).logits
