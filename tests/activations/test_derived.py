"""Values of a shared input, against the families' own modules called by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosshead.activations.anatomy import anatomy
from crosshead.activations.cache import ActivationCache
from crosshead.activations.capture import capture
from crosshead.activations.splice import splice
from crosshead.dictionaries.base import Site
from tests.activations.harvests import make_config, make_corpus, run_harvest
from tests.activations.test_capture import FAMILIES, OTHERS, from_config, random_tokens, relative

FUSED: dict[str, Callable[[Any, Tensor, Any], Tensor]] = {
    "gpt2": lambda layer, x, dims: layer.attn.c_attn(layer.ln_1(x))[..., -dims.d_model :],
    "gpt_neox": lambda layer, x, dims: (
        layer.attention.query_key_value(layer.input_layernorm(x))
        .unflatten(-1, (dims.n_heads, 3 * dims.head_dim))[..., -dims.head_dim :]
        .flatten(2)
    ),
    "opt": lambda layer, x, dims: layer.self_attn.v_proj(layer.self_attn_layer_norm(x)),
}


def by_hand(family: str, model: Any, layer: int, resid: Tensor) -> Tensor:
    """v [B, K, T, E] of a layer that reads ``resid``."""
    module = anatomy(model).layers[layer].layer
    usual = lambda part, x, dims: part.self_attn.v_proj(part.input_layernorm(x))  # noqa: E731
    flat = FUSED.get(family, usual)(module, resid, model.dims)
    return flat.unflatten(-1, (model.dims.n_kv_heads, model.dims.head_dim)).transpose(1, 2)


@pytest.fixture
def model_of(tiny_model):
    return lambda family: from_config(OTHERS[family]) if family in OTHERS else tiny_model(family)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_values_are_made_by_the_layers_own_norm_and_map_of_the_lowest_residual_stream(family: str, model_of):
    model = model_of(family)
    sites = [Site(0, "resid_in"), Site(0, "v"), *(Site(layer, "v_shared_input") for layer in (0, 1, 2))]
    found = capture(model, random_tokens(model), sites)
    for layer in (0, 1, 2):
        expected = by_hand(family, model, layer, found[Site(0, "resid_in")])
        assert found[Site(layer, "v_shared_input")].shape == expected.shape
        assert relative(found[Site(layer, "v_shared_input")], expected) < 1e-5
    assert torch.equal(found[Site(0, "v_shared_input")], found[Site(0, "v")]), "the lowest layer shares with itself"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_real_pair_of_layers_differs_from_its_shared_input(family: str, tiny_model):
    model = tiny_model(family)
    sites = [Site(1, "v"), Site(2, "v"), Site(2, "v_shared_input")]
    found = capture(model, random_tokens(model), sites)
    resid = capture(model, random_tokens(model), [Site(1, "resid_in")])[Site(1, "resid_in")]
    assert relative(found[sites[2]], by_hand(family, model, 2, resid)) < 1e-5
    assert relative(found[sites[2]], found[sites[1]]) > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_sites_of_the_same_pass_are_as_without(family: str, tiny_model):
    model, tokens = tiny_model(family), random_tokens(tiny_model(family))
    names = ("q", "k", "v", "resid_in", "attn_out", "mlp_in", "mlp_out", "resid_out")
    sites = [Site(layer, name) for layer in (1, 2) for name in names]
    plain = capture(model, tokens, sites)
    found = capture(model, tokens, [*sites, Site(1, "v_shared_input"), Site(2, "v_shared_input")])
    for site in sites:
        assert torch.equal(found[site], plain[site]), site


def test_the_layer_they_are_made_of_can_be_named_and_lies_below(tiny_model):
    model, site = tiny_model("llama"), Site(2, "v_shared_input")
    tokens = random_tokens(model)
    residuals = capture(model, tokens, [Site(layer, "resid_in") for layer in (0, 1)])
    for layer in (0, 1):
        found = capture(model, tokens, [site], shared_from=layer)[site]
        assert relative(found, by_hand("llama", model, 2, residuals[Site(layer, "resid_in")])) < 1e-5
    with pytest.raises(
        ValueError, match=r"site 0\.v_shared_input cannot be made of the residual input of layer 1 above"
    ):
        capture(model, tokens, [Site(0, "v_shared_input")], shared_from=1)


def test_the_pass_ends_before_the_layer_runs_and_leaves_the_model_as_it_was(tiny_model):
    model, tokens = tiny_model("llama"), random_tokens(tiny_model("llama"))
    implementation, logits = model.model.config._attn_implementation, model.model(tokens).logits
    ran: list[int] = []
    layers = [part.layer for part in anatomy(model).layers]
    handles = [layer.self_attn.o_proj.register_forward_hook(lambda *_, i=i: ran.append(i))
               for i, layer in enumerate(layers)]  # fmt: skip
    capture(model, tokens, [Site(0, "v"), Site(1, "v_shared_input")])
    for handle in handles:
        handle.remove()
    assert ran == [0]
    assert model.model.config._attn_implementation == implementation
    assert torch.equal(model.model(tokens).logits, logits)
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_a_layer_that_makes_no_values_by_itself_is_refused_by_family():
    model = from_config(OTHERS["mistral"])
    anatomy(model).layers[1].layer.forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(ValueError, match=r"site 1\.v_shared_input: a layer of model type 'mistral' does not come"):
        capture(model, random_tokens(model), [Site(0, "v"), Site(1, "v_shared_input")])


def test_they_cannot_be_spliced_in(tiny_model):
    model, tokens = tiny_model("llama"), random_tokens(tiny_model("llama"))
    values = capture(model, tokens, [Site(1, "v_shared_input")])
    with pytest.raises(ValueError, match=r"site 1\.v_shared_input is no place in the forward pass"):
        splice(model, tokens, values, torch.ones_like(tokens, dtype=torch.bool))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_harvest_keeps_them_beside_the_layers_own(family: str, tiny_model, tmp_path: Path):
    model = tiny_model(family)
    sites = ({"layer": "first", "names": ["v"]}, {"layer": "second", "names": ["v", "v_shared_input"]})
    cache = ActivationCache.open(run_harvest(model, tmp_path, make_config(sites=sites)), verify="sha256")
    tokens = make_corpus(model).tokens("train")
    resid = capture(model, tokens, [Site(1, "resid_in")])[Site(1, "resid_in")]
    site = Site(2, "v_shared_input")
    assert relative(cache.read("train", range(10), [site])[site], by_hand(family, model, 2, resid)) < 1e-5
    assert cache.lowest_layer == 1
