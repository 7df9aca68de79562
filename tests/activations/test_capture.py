import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    GlmConfig,
    GPTJConfig,
    GPTNeoConfig,
    GptOssConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
)

from crosshead.activations.anatomy import anatomy
from crosshead.activations.base_model import LanguageModel
from crosshead.activations.capture import attention_specs, capture, layer_weights, rotary_tables
from crosshead.activations.interface import EXACT, FAST
from crosshead.dictionaries.base import ModelDims, Site
from crosshead.maths.patterns import attention_patterns, expand_kv, undo_rotation

FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2")
NAMES = ("q", "k", "v", "pattern", "resid_in", "attn_out", "mlp_in", "mlp_out", "resid_out")
SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
OTHERS: dict[str, PretrainedConfig] = {
    "mistral": MistralConfig(sliding_window=5, **GROUPED),
    "gpt_oss": GptOssConfig(sliding_window=5, num_local_experts=2, num_experts_per_tok=1, **GROUPED),
    "glm": GlmConfig(**GROUPED),
    "cohere": CohereConfig(**GROUPED),
    "opt": OPTConfig(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **SMALL),
}
REFUSED: dict[str, PretrainedConfig] = {
    "gptj": GPTJConfig(vocab_size=60, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "gpt_neo": GPTNeoConfig(
        vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]]
    ),
    "bloom": BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4),
    "falcon": FalconConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
}


def from_config(config: PretrainedConfig) -> LanguageModel:
    """A random model of any family, with weights large enough for uneven patterns."""
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    n_heads = config.num_attention_heads
    dims = ModelDims(
        d_model=config.hidden_size, n_heads=n_heads, n_kv_heads=getattr(config, "num_key_value_heads", n_heads),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // n_heads, n_layers=config.num_hidden_layers,
    )  # fmt: skip
    return LanguageModel(model, None, dims, "random", {}, 64)


def random_tokens(model: LanguageModel, n_contexts: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    vocabulary = model.model.config.vocab_size
    return torch.randint(0, vocabulary, (n_contexts, length), generator=torch.Generator().manual_seed(seed))


def eager(model: LanguageModel, tokens: torch.Tensor):
    """The family's own eager outputs, with the implementation put back."""
    before = model.model.config._attn_implementation
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model.model(tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
    model.model.set_attn_implementation(before)
    return output


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def check_parity(model: LanguageModel, tokens: torch.Tensor, layers: range | list[int]) -> None:
    """Patterns, residual stream and attention outputs against the model's own eager pass."""
    sites = [Site(layer, name) for layer in layers for name in NAMES]
    found = capture(model, tokens, sites)
    expected = eager(model, tokens)
    specs = attention_specs(model, layers)
    for layer in layers:
        pattern = found[Site(layer, "pattern")]
        assert_close(pattern, expected.attentions[layer], rtol=0, atol=1e-5)
        recomputed = attention_patterns(found[Site(layer, "q")], found[Site(layer, "k")], specs[layer])
        assert torch.equal(recomputed, pattern)
        assert relative(found[Site(layer, "resid_in")], expected.hidden_states[layer]) < 1e-5
        if layer + 1 < model.dims.n_layers:
            assert relative(found[Site(layer, "resid_out")], expected.hidden_states[layer + 1]) < 1e-5
        weights = layer_weights(model, layer)
        heads = expected.attentions[layer] @ expand_kv(found[Site(layer, "v")], model.dims.n_heads)
        attn_out = torch.einsum("bhte,hed->btd", heads, weights.W_O) + weights.b_O
        assert relative(found[Site(layer, "attn_out")], attn_out) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_and_outputs_equal_the_eager_ones(family: str, tiny_model):
    model = tiny_model(family)
    check_parity(model, random_tokens(model), range(3))


@pytest.mark.parametrize("family", OTHERS)
def test_families_nobody_named_equal_their_eager_selves_too(family: str):
    model = from_config(OTHERS[family])
    check_parity(model, random_tokens(model), range(3))


def test_smollm2_patterns_and_outputs_equal_the_eager_ones(smollm2: LanguageModel):
    check_parity(smollm2, random_tokens(smollm2, 1, 48), [0, 17, 23])


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_stream_is_input_plus_attention_plus_mlp(family: str, tiny_model):
    model = tiny_model(family)
    found = capture(model, random_tokens(model), [Site(1, name) for name in NAMES])
    attn_out, mlp_out = found[Site(1, "attn_out")], found[Site(1, "mlp_out")]
    if family == "gemma2":
        layer = model.model.model.layers[1]
        attn_out, mlp_out = layer.post_attention_layernorm(attn_out), layer.post_feedforward_layernorm(mlp_out)
    assert relative(found[Site(1, "resid_in")] + attn_out + mlp_out, found[Site(1, "resid_out")]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_sites_are_the_input_and_output_of_the_mlp(family: str, tiny_model):
    model = tiny_model(family)
    found = capture(model, random_tokens(model), [Site(1, "mlp_in"), Site(1, "mlp_out")])
    mlp = anatomy(model).layers[1].layer.mlp
    assert relative(mlp(found[Site(1, "mlp_in")]), found[Site(1, "mlp_out")]) < 1e-5


def test_grouped_query_sites_keep_their_own_heads_and_the_width_of_the_config(tiny_model):
    model = tiny_model("llama")
    found = capture(model, random_tokens(model), [Site(1, name) for name in ("q", "k", "v")])
    shapes = [tuple(tensor.shape) for tensor in found.values()]
    assert shapes == [(2, 4, 20, 12), (2, 2, 20, 12), (2, 2, 20, 12)]


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3", "gemma2"])
def test_undoing_the_rotation_gives_back_what_the_projections_and_norms_made(family: str, tiny_model):
    model = tiny_model(family)
    tokens = random_tokens(model)
    found = capture(model, tokens, [Site(1, "q"), Site(1, "k"), Site(1, "resid_in")])
    part = anatomy(model).layers[1]
    normed = part.layer.input_layernorm(found[Site(1, "resid_in")])
    if family == "gpt_neox":
        fused = part.attention.query_key_value(normed).view(2, 20, 4, 24).transpose(1, 2)
        q, k = fused[..., :8], fused[..., 8:16]
    else:
        q = part.attention.q_proj(normed).view(2, 20, 4, 12)
        k = part.attention.k_proj(normed).view(2, 20, 2, 12)
        if family == "qwen3":
            q, k = part.attention.q_norm(q), part.attention.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = rotary_tables(model, 1, 20)
    assert relative(undo_rotation(found[Site(1, "q")], cos, sin), q) < 1e-5
    assert relative(undo_rotation(found[Site(1, "k")], cos, sin), k) < 1e-5
    assert part.spec.rotary == "rotary.1"


@pytest.mark.parametrize("family", ["glm", "cohere", "gpt_oss"])
def test_other_rotary_conventions_are_undone(family: str):
    model = from_config(OTHERS[family])
    found = capture(model, random_tokens(model), [Site(0, "k"), Site(0, "resid_in")])
    part = anatomy(model).layers[0]
    k = part.attention.k_proj(part.layer.input_layernorm(found[Site(0, "resid_in")])).view(2, 20, 2, 8).transpose(1, 2)
    cos, sin = rotary_tables(model, 0, 20)
    interleaved = attention_specs(model, [0])[0].rotary_interleaved
    assert interleaved == bool(torch.equal(cos[:, ::2], cos[:, 1::2])) == (family != "gpt_oss")
    assert relative(undo_rotation(found[Site(0, "k")], cos, sin, interleaved=interleaved), k) < 1e-5


def test_models_with_learned_positions_have_no_rotation(tiny_model):
    model = tiny_model("gpt2")
    assert rotary_tables(model, 1, 8) is None
    assert attention_specs(model, [1])[1].rotary is None


def test_specs_hold_soft_cap_window_and_scale(tiny_model):
    specs = attention_specs(tiny_model("gemma2"), range(3))
    assert [spec.sliding_window for spec in specs.values()] == [6, None, 6]
    assert {spec.softcap for spec in specs.values()} == {5.0}
    assert {spec.scale for spec in specs.values()} == {10**-0.5}
    assert attention_specs(from_config(OTHERS["gpt_oss"]), [0])[0].sinks is not None


def test_soft_capped_models_run_eagerly_and_others_through_sdpa(tiny_model):
    assert anatomy(tiny_model("gemma2")).implementation == EXACT
    assert anatomy(tiny_model("llama")).implementation == FAST


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_pass_ends_at_the_deepest_site(name: str, tiny_model):
    model = tiny_model("llama")
    anatomy(model)
    ran: list[int] = []
    layers = [part.layer for part in anatomy(model).layers]
    handles = [layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    handles.append(layers[1].mlp.register_forward_pre_hook(lambda *_: ran.append(-1)))
    capture(model, random_tokens(model), [Site(0, "resid_in"), Site(1, name)])
    for handle in handles:
        handle.remove()
    assert ran == ([0, 1, -1] if name in ("mlp_in", "mlp_out", "resid_out") else [0, 1])


def test_capture_leaves_the_model_as_it_was(tiny_model):
    model = tiny_model("llama")
    tokens = random_tokens(model)
    implementation, logits = model.model.config._attn_implementation, model.model(tokens).logits
    capture(model, tokens, [Site(2, "pattern"), Site(1, "attn_out")])
    assert model.model.config._attn_implementation == implementation
    assert torch.equal(model.model(tokens).logits, logits)
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_captured_tensors_are_copies_the_model_cannot_change(tiny_model):
    model = tiny_model("gpt2")
    found = capture(model, random_tokens(model), [Site(1, "k")])[Site(1, "k")]
    assert found.is_contiguous()
    assert found.untyped_storage().nbytes() == found.numel() * 4


def test_conv1d_output_weights_are_not_transposed(tiny_model):
    model = tiny_model("gpt2")
    projection = model.model.transformer.h[1].attn.c_proj
    weights = layer_weights(model, 1)
    heads = torch.randn(4, 8)
    assert_close(torch.einsum("he,hed->d", heads, weights.W_O) + weights.b_O, projection(heads.reshape(1, 32))[0])


def test_layer_weights_are_refused_where_the_projection_reads_something_else():
    model = from_config(OTHERS["mistral"])
    attention = anatomy(model).layers[1].attention
    attention.o_proj.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 2,))
    with pytest.raises(ValueError, match="layer 1: the attention output is not a linear map"):
        layer_weights(model, 1)


@pytest.mark.parametrize("family", REFUSED)
def test_families_outside_the_interface_are_refused(family: str):
    with pytest.raises(ValueError, match=rf"'{family}': 0 of 2 layers call transformers' attention interface"):
        capture(from_config(REFUSED[family]), torch.ones(1, 4, dtype=torch.long), [Site(0, "q")])


def test_a_config_that_lies_about_its_heads_is_refused():
    model = from_config(OTHERS["glm"])
    wrong = LanguageModel(model.model, None, model.dims.model_copy(update={"head_dim": 16}), "random", {}, 64)
    with pytest.raises(ValueError, match="the model's config says"):
        attention_specs(wrong, [0])


def test_layers_out_of_range_and_long_contexts_are_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="layer 3 is out of range; the model has layers 0 to 2"):
        capture(model, random_tokens(model), [Site(3, "q")])
    with pytest.raises(ValueError, match="contexts of 129 tokens exceed the model's limit of 128"):
        capture(model, random_tokens(model, length=129), [Site(1, "q")])
    with pytest.raises(ValueError, match="integer ids"):
        capture(model, torch.zeros(2, 3), [Site(1, "q")])
