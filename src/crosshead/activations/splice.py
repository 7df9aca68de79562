"""Run the model with some of its activations replaced by others.

Replacements at one layer leave everything below it as it was, so several of them on the same tokens share a ``Prefix``:
the first pass keeps the residual stream that enters the layer, the others begin there.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from crosshead.activations.anatomy import anatomy
from crosshead.activations.base_model import LanguageModel
from crosshead.activations.rotation import rewrite_input
from crosshead.activations.sites import site_shape
from crosshead.activations.taps import check_site, check_tokens, tapped
from crosshead.dictionaries.base import Site

__all__ = ["Prefix", "run_with_prefix", "splice"]


@dataclass(frozen=True)
class Prefix:
    """A forward pass over some contexts up to the entrance of one layer."""

    layer: int
    """The layer it stops at."""
    resid: Float[Tensor, "B T d_model"]
    """The residual stream that enters it."""
    outputs: tuple[tuple[Any, ...] | None, ...]
    """What every layer below returned beside the residual stream; None for families that return that alone."""


@torch.no_grad()
def run_with_prefix(
    model: LanguageModel, tokens: Int[Tensor, "B T"], layer: int
) -> tuple[Float[Tensor, "B T V"], Prefix]:
    """Logits of the untouched model, and the prefix below ``layer``. ValueError for what ``capture`` refuses."""
    check_tokens(model, tokens)
    check_site(model, Site(layer, "resid_in"))
    layers = anatomy(model).layers
    outputs: dict[int, Any] = {}
    seen: dict[str, Tensor] = {}

    def keep_output(index: int, output: Any) -> None:
        outputs[index] = output[1:] if isinstance(output, tuple) else None

    def keep_resid(resid: Tensor) -> None:
        seen["resid"] = resid.detach().clone()

    with ExitStack() as stack:
        for index, part in enumerate(layers[:layer]):
            hook = part.layer.register_forward_hook(lambda _m, _a, output, index=index: keep_output(index, output))
            stack.callback(hook.remove)
        stack.enter_context(rewrite_input(layers[layer].layer, keep_resid))
        logits = splice(model, tokens, {}, torch.zeros_like(tokens, dtype=torch.bool))
    return logits, Prefix(layer, seen["resid"], tuple(outputs[index] for index in range(layer)))


@contextmanager
def _beginning_at(model: LanguageModel, prefix: Prefix) -> Iterator[None]:
    """While active, layers below the prefix's compute nothing and its residual stream enters its layer."""
    layers = anatomy(model).layers
    with ExitStack() as stack:
        for part, rest in zip(layers[: prefix.layer], prefix.outputs, strict=True):
            stack.enter_context(_returning(part.layer, prefix.resid if rest is None else (prefix.resid, *rest)))
        stack.enter_context(rewrite_input(layers[prefix.layer].layer, lambda _: prefix.resid))
        yield


@contextmanager
def _returning(layer: nn.Module, output: Any) -> Iterator[None]:
    """Let a layer return ``output`` without computing anything."""
    layer.forward = lambda *_arguments, **_keywords: output
    try:
        yield
    finally:
        del layer.forward  # the class's own comes back


@torch.no_grad()
def splice(
    model: LanguageModel,
    tokens: Int[Tensor, "B T"],
    replacements: Mapping[Site, Tensor],
    mask: Bool[Tensor, "B T"],
    *,
    prefix: Prefix | None = None,
) -> Float[Tensor, "B T V"]:
    """Logits of the model run with each site overwritten by its replacement where ``mask`` is True.

    With a ``prefix`` of the same tokens, layers below it are not run again; no replacement may lie below it.

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
    if prefix is not None:
        below = [site for site in replacements if site.layer < prefix.layer]
        if below or prefix.resid.shape[:2] != tokens.shape:
            raise ValueError(f"the prefix holds {tuple(prefix.resid.shape[:2])} positions below layer {prefix.layer}, "
                             f"asked for {tuple(tokens.shape)} and replacements at {', '.join(map(str, below)) or 'no'}"
                             " site below it; make it from the same tokens, at the lowest layer replaced")  # fmt: skip
    mask = mask.to(model.device)

    def overwrite(site: Site, tensor: Tensor) -> Tensor:
        replacement = replacements[site].to(tensor)
        where = mask[:, None, :, None] if replacement.ndim == 4 else mask[:, :, None]
        return torch.where(where, replacement, tensor.view(replacement.shape)).view(tensor.shape)

    with model.running, ExitStack() as stack:
        if prefix is not None:  # first, so that a replacement at the entrance of its layer comes after it
            stack.enter_context(_beginning_at(model, prefix))
        stack.enter_context(tapped(model, list(replacements), overwrite))
        return model.model(tokens.to(model.device), use_cache=False).logits
