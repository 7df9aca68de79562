"""Activations of a model, whatever its family, as tensors named by site.

Sites with post-norms (Gemma 2): attn_out and mlp_out are what the attention block and the MLP put out, before the norm
that follows them, so that attn_out is always a linear map of the head outputs.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from crosshead.activations.anatomy import anatomy, probe_tokens
from crosshead.activations.base_model import LanguageModel
from crosshead.activations.derived import shared_input_values
from crosshead.activations.rotation import Tables, read_tables
from crosshead.activations.sites import recompute_patterns, site_shape, stored_sites
from crosshead.activations.taps import check_site, check_tokens, tapped
from crosshead.dictionaries.base import LayerWeights, Site
from crosshead.maths.patterns import AttentionSpec, expand_kv

__all__ = ["attention_specs", "capture", "layer_weights", "rotary_tables"]


class _AllSeen(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass at the last activation that was asked for."""


@torch.no_grad()
def capture(
    model: LanguageModel, tokens: Int[Tensor, "B T"], sites: Sequence[Site], *, shared_from: int | None = None
) -> dict[Site, Tensor]:
    """Run the model on whole contexts and return the sites asked for (shapes: see Site).

    The forward pass ends as soon as the last of them has been seen. Tensors are copies on the model's device and in
    its dtype; patterns are float32, recomputed from q and k. ``v_shared_input`` is made of the residual input of layer
    ``shared_from``, by default the lowest layer of ``sites``. ValueError for a layer out of range, a site the model has
    not, contexts longer than the model allows, or a family that cannot be captured.
    """
    found: dict[Site, Tensor] = {}
    wanted = stored_sites(sites)
    derived = [site for site in wanted if site.name == "v_shared_input"]
    tapped_sites = [site for site in wanted if site not in derived]
    lowest = min((site.layer for site in wanted), default=0) if shared_from is None else shared_from

    def keep(site: Site, tensor: Tensor) -> None:
        # A copy: the model may go on to change its tensors in place, and a view of fused q, k, v would hold all three.
        found[site] = tensor.detach().clone(memory_format=torch.contiguous_format)
        if len(found) == len(wanted):
            raise _AllSeen

    with model.running:
        check_tokens(model, tokens)
        for site in sites:
            check_site(model, site)
        if wanted:
            with (
                shared_input_values(model, derived, lowest, keep),
                tapped(model, tapped_sites, keep),
                suppress(_AllSeen),
            ):
                model.model(tokens.to(model.device), use_cache=False)
    # Some families hand their MLP one long list of positions.
    shaped = {site: tensor.view(tokens.shape[0], *site_shape(site, model.dims, tokens.shape[1]))
              for site, tensor in found.items()}  # fmt: skip
    return recompute_patterns(shaped, sites, attention_specs(model, {site.layer for site in sites}))


def attention_specs(model: LanguageModel, layers: Iterable[int]) -> dict[int, AttentionSpec]:
    """What turns q and k into a pattern, per layer. ValueError for a layer out of range."""
    specs: dict[int, AttentionSpec] = {}
    for layer in layers:
        check_site(model, Site(layer, "q"))
        specs[layer] = anatomy(model).layers[layer].spec
    return specs


@torch.no_grad()
def layer_weights(model: LanguageModel, layer: int) -> LayerWeights:
    """The layer's output map as W_O [H, E, d_model] and b_O [d_model], float32, on the CPU.

    Checked on a few tokens: the map applied to pattern times values must give the model's own attention output.
    ValueError where it does not (gated heads, a norm before the output projection).
    """
    check_site(model, Site(layer, "attn_out"))
    dims, projection = model.dims, anatomy(model).layers[layer].projection
    weights = None if projection is None else _linear_map(projection)
    if weights is not None and weights[0].shape == (dims.n_heads * dims.head_dim, dims.d_model):
        W_O = weights[0].reshape(dims.n_heads, dims.head_dim, dims.d_model)
        if _is_output_map(model, layer, W_O, weights[1]):
            return LayerWeights(W_O, weights[1])
    raise ValueError(f"layer {layer}: the attention output is not a linear map of the head outputs (gated heads, or a "
                     "norm in between?), so it has no W_O; choose another model")  # fmt: skip


def _linear_map(module: nn.Module) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """Weight as x @ W, and bias, of a linear module. GPT-2's Conv1D stores its weight transposed to nn.Linear's."""
    assert isinstance(module, nn.Linear | Conv1D), "the probe looks at no other kind"
    weight = module.weight if isinstance(module, Conv1D) else module.weight.T
    bias = weight.new_zeros(weight.shape[1]) if module.bias is None else module.bias
    return weight.float().cpu().clone(memory_format=torch.contiguous_format), bias.float().cpu().clone()


def _is_output_map(model: LanguageModel, layer: int, W_O: Tensor, b_O: Tensor) -> bool:
    sites = [Site(layer, "pattern"), Site(layer, "v"), Site(layer, "attn_out")]
    pattern, v_BKTE, attn_out = (tensor.float().cpu()
                                 for tensor in capture(model, probe_tokens(model), sites).values())  # fmt: skip
    heads_BHTE = pattern @ expand_kv(v_BKTE, model.dims.n_heads)
    predicted = torch.einsum("bhte,hed->btd", heads_BHTE, W_O) + b_O
    tolerance = 1e-3 if next(model.model.parameters()).dtype == torch.float32 else 5e-2
    return bool((predicted - attn_out).abs().max() <= tolerance * attn_out.abs().max())


def rotary_tables(model: LanguageModel, layer: int, length: int) -> Tables | None:
    """The cos and sin that turned q and k of one layer at positions 0..T-1, float32, on the CPU; None: no rotation.

    These are the model's own tables, every frequency twice, as ``undo_rotation`` wants them: where neighbouring columns
    are equal the coordinates pair as (0,1),(2,3)... (``interleaved=True``), otherwise column j equals column j + R/2.
    """
    check_site(model, Site(layer, "q"))
    part = anatomy(model).layers[layer]
    if part.rotary is None:
        return None
    tokens = probe_tokens(model, length)
    check_tokens(model, tokens)
    cos, sin = read_tables(model.model, tokens, part.attention, part.rotary)
    return cos.cpu(), sin.cpu()
