"""Sites as places in a running model: everything that reads or overwrites an activation goes through ``tapped``.

``q``, ``k`` and ``v`` are tapped in the attention interface, all other sites by plain module hooks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from crosshead.activations.anatomy import LayerAnatomy, anatomy
from crosshead.activations.base_model import LanguageModel
from crosshead.activations.interface import AttentionResult, observed_attention
from crosshead.activations.rotation import rewrite_input
from crosshead.dictionaries.base import Site

__all__ = ["Visit", "check_site", "check_tokens", "tapped"]

Visit = Callable[[Site, Tensor], Tensor | None]

_INTERFACE_SITES = ("q", "k", "v")


def check_site(model: LanguageModel, site: Site) -> None:
    """ValueError for a layer the model has not, or an MLP site of a layer whose MLP cannot be told apart."""
    n_layers = model.dims.n_layers
    if not 0 <= site.layer < n_layers:
        raise ValueError(f"site {site}: layer {site.layer} is out of range; the model has layers 0 to {n_layers - 1}; "
                         "correct harvest.sites")  # fmt: skip
    if site.name.startswith("mlp") and anatomy(model).layers[site.layer].mlp is None:
        raise ValueError(f"site {site}: layer {site.layer} has no single MLP block; leave the MLP sites out")


def check_tokens(model: LanguageModel, tokens: Tensor) -> None:
    """ValueError unless tokens are [B, T] and fit the model's context."""
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens must be integer ids [contexts, positions], got {tokens.dtype} "
                         f"of shape {tuple(tokens.shape)}")  # fmt: skip
    if model.context_limit is not None and tokens.shape[1] > model.context_limit:
        raise ValueError(f"contexts of {tokens.shape[1]} tokens exceed the model's limit of {model.context_limit}; "
                         "lower corpus.context_length")  # fmt: skip


@contextmanager
def tapped(model: LanguageModel, sites: Sequence[Site], visit: Visit) -> Iterator[None]:
    """While active, a forward pass calls ``visit(site, tensor)`` for each of ``sites``, in the order they arise.

    ``visit`` sees the live tensor in the site's shape (clone what is kept) and returns None to leave it or a
    replacement of the same shape to overwrite it. It may raise to end the pass early.
    """
    for site in sites:
        check_site(model, site)
    body = anatomy(model)
    in_attention = {body.layers[site.layer].attention: site.layer for site in sites if site.name in _INTERFACE_SITES}

    def observe(
        module: nn.Module,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTE: Tensor,
        keywords: dict[str, Any],
        proceed: Callable[[Tensor, Tensor, Tensor], AttentionResult],
    ) -> AttentionResult:
        tensors = [q_BHTE, k_BKTE, v_BKTE]
        if module in in_attention:
            for index, name in enumerate(_INTERFACE_SITES):
                site = Site(in_attention[module], name)
                changed = visit(site, tensors[index]) if site in sites else None
                tensors[index] = tensors[index] if changed is None else changed
        return proceed(tensors[0], tensors[1], tensors[2])

    with ExitStack() as stack:
        for site in sites:
            if site.name not in _INTERFACE_SITES:
                stack.enter_context(_module_tap(body.layers[site.layer], site, visit))
        stack.enter_context(observed_attention(model.model, body.implementation, observe))
        yield


@contextmanager
def _module_tap(part: LayerAnatomy, site: Site, visit: Visit) -> Iterator[None]:
    """Hook the module whose input or output is the site."""

    def change(tensor: Tensor) -> Tensor | None:
        return visit(site, tensor)

    match site.name:
        case "resid_in":
            tap = rewrite_input(part.layer, change)
        case "resid_out":
            tap = _rewrite_output(part.layer, change)
        case "attn_out":
            tap = _rewrite_output(part.attention, change)
        case "mlp_in":
            assert part.mlp is not None, "check_site has seen to it"
            tap = rewrite_input(part.mlp[0], change)
        case "mlp_out":
            assert part.mlp is not None, "check_site has seen to it"
            tap = _rewrite_output(part.mlp[1], change)
        case _:
            raise ValueError(f"site {site} is no place in the forward pass; patterns are recomputed from q and k, "
                             "v_shared_input from a residual stream")  # fmt: skip
    with tap:
        yield


@contextmanager
def _rewrite_output(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Pass a module's output, or the first tensor of a tuple it returns, through ``change``; None keeps it."""

    def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        changed = change(output[0] if isinstance(output, tuple) else output)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
