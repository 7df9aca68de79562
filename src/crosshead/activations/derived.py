"""Values that a layer would have if it read another layer's residual stream: the site ``v_shared_input``.

Two layers of a residual network read nearly the same stream, so their values are alike even where they have no feature
in common. What is left of a two-layer advantage when both layers read one and the same stream is "shared input"
(design choice; a control for the two-layer value SAEs of Jermyn et al., Progress on Attention, 2025).

In the midst of the forward pass, when its turn has come, a layer is entered once more with the other residual stream in
place of its own and left at its attention call. So its own norm, value map, bias and whatever its family puts between
them are the model's own modules, and no family is named here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from crosshead.activations.anatomy import Anatomy, anatomy
from crosshead.activations.base_model import LanguageModel
from crosshead.activations.interface import AttentionResult, observed_attention
from crosshead.activations.rotation import change_input, rewrite_input
from crosshead.dictionaries.base import Site

__all__ = ["shared_input_values"]


class _ValuesSeenError(Exception):
    """Ends a layer's second run at its attention call."""


@contextmanager
def shared_input_values(
    model: LanguageModel, sites: Sequence[Site], lowest: int, keep: Callable[[Site, Tensor], None]
) -> Iterator[None]:
    """While active, a forward pass calls ``keep(site, values)`` for each ``v_shared_input`` among ``sites``.

    ``values`` [B, K, T, E] are made of the residual input of layer ``lowest``, just before the site's own layer runs.
    ValueError for a site below ``lowest``, and, within the forward pass, for a family whose layers do not come to their
    attention when they are run by themselves.
    """
    below = [site for site in sites if site.layer < lowest]
    if below:
        raise ValueError(f"site {below[0]} cannot be made of the residual input of layer {lowest} above it; keep "
                         f"a site of layer {below[0].layer} or a lower one in harvest.sites")  # fmt: skip
    if not sites:
        yield
        return
    body = anatomy(model)
    resid: list[Tensor] = []

    def remember(tensor: Tensor) -> None:
        resid[:] = [tensor.detach().clone()]

    def enter(site: Site, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        call = change_input(arguments, keywords, lambda _: resid[0])
        assert call is not None, "the input is always changed"
        keep(site, _values(model, body, site, *call))

    with ExitStack() as stack:
        stack.enter_context(rewrite_input(body.layers[lowest].layer, remember))
        for site in sites:
            hook = body.layers[site.layer].layer.register_forward_pre_hook(partial(enter, site), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _values(
    model: LanguageModel, body: Anatomy, site: Site, arguments: tuple[Any, ...], named: dict[str, Any]
) -> Float[Tensor, "B K T E"]:
    """Enter a layer with these arguments, past the hooks on it, and leave it with its values."""
    seen: list[Tensor] = []

    def observe(
        module: nn.Module,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTE: Tensor,
        keywords: dict[str, Any],
        proceed: Callable[[Tensor, Tensor, Tensor], AttentionResult],
    ) -> AttentionResult:
        seen.append(v_BKTE)
        raise _ValuesSeenError

    with observed_attention(model.model, body.implementation, observe), suppress(_ValuesSeenError):
        body.layers[site.layer].layer.forward(*arguments, **named)
    if not seen:
        family = getattr(model.model.config, "model_type", type(model.model).__name__)
        raise ValueError(f"site {site}: a layer of model type {family!r} does not come to its attention when it is run "
                         "by itself; leave v_shared_input out of harvest.sites")  # fmt: skip
    return seen[0]
