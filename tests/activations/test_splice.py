import pytest
import torch

from crosshead.activations.anatomy import anatomy
from crosshead.activations.base_model import LanguageModel
from crosshead.activations.capture import capture
from crosshead.activations.splice import run_with_prefix, splice
from crosshead.dictionaries.base import Site

FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2")
NAMES = ("q", "k", "v", "resid_in", "attn_out", "mlp_in", "mlp_out", "resid_out")


def some_tokens(n_contexts: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 250, (n_contexts, length), generator=torch.Generator().manual_seed(0))


def some_mask(tokens: torch.Tensor) -> torch.Tensor:
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, 0] = False
    return mask


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_activations_change_nothing(family: str, tiny_model):
    model, tokens = tiny_model(family), some_tokens()
    expected = model.model(tokens).logits
    for name in NAMES:
        own = capture(model, tokens, [Site(1, name)])
        assert relative(splice(model, tokens, own, torch.ones_like(tokens, dtype=torch.bool)), expected) < 1e-5


def test_own_activations_of_several_layers_change_nothing_on_smollm2(smollm2: LanguageModel):
    tokens = some_tokens(1, 24)
    own = capture(smollm2, tokens, [Site(17, "attn_out"), Site(17, "v"), Site(23, "v"), Site(20, "resid_out")])
    assert relative(splice(smollm2, tokens, own, some_mask(tokens)), smollm2.model(tokens).logits) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["attn_out", "mlp_out", "resid_out"])
def test_zeros_equal_hooking_zeros(family: str, name: str, tiny_model):
    model, tokens = tiny_model(family), some_tokens()
    mask = some_mask(tokens)
    part = anatomy(model).layers[1]
    module = {"attn_out": part.attention, "mlp_out": part.layer.mlp, "resid_out": part.layer}[name]

    def zero(_module: torch.nn.Module, _arguments: tuple, output):
        if isinstance(output, tuple):
            return (output[0] * ~mask[..., None], *output[1:])
        return output * ~mask[..., None]

    handle = module.register_forward_hook(zero)
    expected = model.model(tokens).logits
    handle.remove()
    zeros = torch.zeros(*tokens.shape, model.dims.d_model)
    spliced = splice(model, tokens, {Site(1, name): zeros}, mask)
    assert relative(spliced, expected) < 1e-5
    assert relative(spliced, model.model(tokens).logits) > 1e-3


@pytest.mark.parametrize(("family", "projection"), [("llama", "v_proj"), ("qwen3", "v_proj"), ("gemma2", "v_proj")])
def test_zero_values_equal_a_value_projection_that_returns_zeros(family: str, projection: str, tiny_model):
    model, tokens = tiny_model(family), some_tokens()
    mask = some_mask(tokens)
    module = getattr(anatomy(model).layers[1].attention, projection)
    handle = module.register_forward_hook(lambda _module, _arguments, output: output * ~mask[..., None])
    expected = model.model(tokens).logits
    handle.remove()
    zeros = torch.zeros(tokens.shape[0], model.dims.n_kv_heads, tokens.shape[1], model.dims.head_dim)
    spliced = splice(model, tokens, {Site(1, "v"): zeros}, mask)
    assert relative(spliced, expected) < 1e-5
    assert relative(spliced, model.model(tokens).logits) > 1e-3


def test_gpt2_values_come_out_of_the_fused_projection(tiny_model):
    model, tokens = tiny_model("gpt2"), some_tokens()
    mask = some_mask(tokens)

    def zero_values(_module: torch.nn.Module, _arguments: tuple, fused: torch.Tensor) -> torch.Tensor:
        q, k, v = fused.chunk(3, dim=-1)
        return torch.cat((q, k, v * ~mask[..., None]), dim=-1)

    handle = anatomy(model).layers[1].attention.c_attn.register_forward_hook(zero_values)
    expected = model.model(tokens).logits
    handle.remove()
    assert relative(splice(model, tokens, {Site(1, "v"): torch.zeros(2, 4, 16, 8)}, mask), expected) < 1e-5


def test_an_empty_mask_changes_nothing_and_a_later_token_never_changes_an_earlier_logit(tiny_model):
    model, tokens = tiny_model("llama"), some_tokens()
    clean, mask = model.model(tokens).logits, torch.zeros_like(tokens, dtype=torch.bool)
    noise = {Site(1, "attn_out"): torch.randn(2, 16, 32), Site(2, "v"): torch.randn(2, 2, 16, 12)}
    assert relative(splice(model, tokens, noise, mask), clean) < 1e-5
    mask[:, 9:] = True
    spliced = splice(model, tokens, noise, mask)
    assert relative(spliced[:, :9], clean[:, :9]) < 1e-5
    assert relative(spliced[:, 9:], clean[:, 9:]) > 1e-3


def test_a_later_replacement_sees_the_effect_of_an_earlier_one(tiny_model):
    model, tokens = tiny_model("llama"), some_tokens()
    mask = some_mask(tokens)
    early, late = Site(0, "attn_out"), Site(1, "mlp_out")
    zeros = torch.zeros(2, 16, 32)
    both = splice(model, tokens, {early: zeros, late: zeros}, mask)
    assert relative(both, splice(model, tokens, {late: zeros}, mask)) > 1e-3
    assert relative(both, splice(model, tokens, {early: zeros}, mask)) > 1e-3


def test_unfit_replacements_are_refused(tiny_model):
    model, tokens = tiny_model("llama"), some_tokens()
    mask = some_mask(tokens)
    with pytest.raises(ValueError, match=r"site 1\.v has shape \(2, 4, 16, 12\), the site has \(2, 2, 16, 12\)"):
        splice(model, tokens, {Site(1, "v"): torch.zeros(2, 4, 16, 12)}, mask)
    with pytest.raises(ValueError, match="patterns are recomputed from q and k"):
        splice(model, tokens, {Site(1, "pattern"): torch.zeros(2, 4, 16, 16)}, mask)
    with pytest.raises(ValueError, match="the mask must be boolean"):
        splice(model, tokens, {}, mask.float())
    with pytest.raises(ValueError, match="layer 3 is out of range"):
        splice(model, tokens, {Site(3, "attn_out"): torch.zeros(2, 16, 32)}, mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_beginning_at_a_prefix_changes_no_logit(family: str, name: str, tiny_model):
    model, tokens = tiny_model(family), some_tokens()
    logits, prefix = run_with_prefix(model, tokens, 1)
    assert torch.equal(logits, splice(model, tokens, {}, some_mask(tokens)))
    replacements = {site: torch.randn_like(own) for site, own in capture(model, tokens, [Site(1, name)]).items()}
    whole = splice(model, tokens, replacements, some_mask(tokens))
    assert torch.equal(splice(model, tokens, replacements, some_mask(tokens), prefix=prefix), whole)
    assert torch.equal(model.model(tokens).logits, logits), "the layers below are themselves again"


def test_layers_below_a_prefix_are_not_run(tiny_model):
    model, tokens = tiny_model("llama"), some_tokens()
    _, prefix = run_with_prefix(model, tokens, 1)
    part = anatomy(model).layers[0]
    calls = []
    handle = part.attention.register_forward_hook(lambda *_: calls.append(1))
    splice(model, tokens, {}, some_mask(tokens), prefix=prefix)
    handle.remove()
    assert calls == []


def test_a_prefix_of_other_tokens_or_above_a_replacement_is_refused(tiny_model):
    model, tokens = tiny_model("llama"), some_tokens()
    _, prefix = run_with_prefix(model, tokens, 1)
    with pytest.raises(ValueError, match="make it from the same tokens"):
        splice(model, tokens[:, :-1], {}, some_mask(tokens[:, :-1]), prefix=prefix)
    below = capture(model, tokens, [Site(0, "attn_out")])
    with pytest.raises(ValueError, match=r"replacements at 0\.attn_out"):
        splice(model, tokens, below, some_mask(tokens), prefix=prefix)
