"""Where a model keeps its layers, attention blocks and MLPs, found by watching it run.

No table of model families: two forward passes over a few tokens tell everything.

1. Which modules call the attention interface, in which order, with which scale, soft-cap, window and sinks. A family
   that does not call it (GPT-J, GPT-Neo, Bloom, Falcon) is refused.
2. Whether the attention spec is complete: the pattern recomputed from it must equal the family's own eager pattern.
3. How q and k are rotated (``rotation``).
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.interface import EXACT, FAST, AttentionResult, observed_attention
from crosshead.activations.rotation import RotaryStyle, rotary_style, run_on_constant_inputs
from crosshead.maths.patterns import AttentionSpec, attention_patterns

__all__ = ["Anatomy", "LayerAnatomy", "anatomy", "probe_tokens"]

_PROBE_LENGTH = 8
_LAYER_TYPES = (None, "full_attention", "sliding_attention")


@dataclass(frozen=True)
class LayerAnatomy:
    """The modules of one decoder layer and what its attention needs."""

    layer: nn.Module
    attention: nn.Module
    projection: nn.Module | None
    """The linear map that reads the head outputs unchanged; None where something stands between."""
    mlp: tuple[nn.Module, nn.Module] | None
    """Modules whose input is mlp_in and whose output is mlp_out; None where they cannot be told apart."""
    spec: AttentionSpec
    rotary: RotaryStyle | None


@dataclass(frozen=True)
class Anatomy:
    """A model's layers in order, and the attention implementation that computes them faithfully."""

    layers: tuple[LayerAnatomy, ...]
    implementation: str


class _Call(NamedTuple):
    """One attention call of the probe."""

    q: Tensor
    k: Tensor
    v: Tensor
    keywords: dict[str, Any]
    pattern: Tensor | None


_known: WeakKeyDictionary[nn.Module, Anatomy] = WeakKeyDictionary()


def anatomy(model: LanguageModel) -> Anatomy:
    """Find a model's layers; the answer is remembered as long as the model lives.

    ValueError for families outside transformers' attention interface, and for attention that q, k and an attention
    spec do not determine.
    """
    if model.model not in _known:
        _known[model.model] = _probe(model)
    return _known[model.model]


def probe_tokens(model: LanguageModel, length: int = _PROBE_LENGTH) -> Tensor:
    """Some token ids [1, T] on the model's device; what they mean does not matter."""
    vocabulary = model.model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue]
    return (torch.arange(1, length + 1, device=model.device) % vocabulary)[None]


def _probe(model: LanguageModel) -> Anatomy:
    calls, projections = _watch(model)
    if len(calls) != model.dims.n_layers:
        raise ValueError(
            f"model type {_model_type(model)!r}: {len(calls)} of {model.dims.n_layers} layers call transformers' "
            "attention interface, so its queries and keys cannot be captured; choose a family whose layers do "
            "(GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma, OPT, Phi, OLMo; not GPT-J, GPT-Neo, Bloom, Falcon)"
        )
    layers = _decoder_layers(model.model, list(calls))
    precise = all(call.q.dtype == torch.float32 for call in calls.values())
    run = run_on_constant_inputs(model.model, probe_tokens(model), layers, list(calls))
    parts: list[LayerAnatomy] = []
    for index, (layer, (attention, call)) in enumerate(zip(layers, calls.items(), strict=True)):
        style = rotary_style(run, attention, tolerance=1e-4 if precise else 4e-2)
        spec = _attention_spec(model, index, attention, call)
        _check_spec(model, index, spec, call, tolerance=1e-4 if precise else 2e-2)
        spec = spec.model_copy(update={"rotary": f"rotary.{index}" if style else None,
                                       "rotary_interleaved": bool(style and style.interleaved)})  # fmt: skip
        parts.append(
            LayerAnatomy(layer, attention, projections.get(attention), _mlp_modules(layer, attention), spec, style)
        )
    sdpa_suffices = all(part.spec.softcap is None and part.spec.sinks is None for part in parts)
    return Anatomy(tuple(parts), FAST if sdpa_suffices else EXACT)


def _model_type(model: LanguageModel) -> str:
    return getattr(model.model.config, "model_type", type(model.model).__name__)


@torch.no_grad()
def _watch(model: LanguageModel) -> tuple[dict[nn.Module, _Call], dict[nn.Module, nn.Module]]:
    """Run the probe: every attention call in order, and per attention the linear map that reads its heads unchanged."""
    calls: dict[nn.Module, _Call] = {}
    projections: dict[nn.Module, nn.Module] = {}
    latest: list[tuple[nn.Module, Tensor]] = []

    def observe(
        module: nn.Module,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTE: Tensor,
        keywords: dict[str, Any],
        proceed: Callable[[Tensor, Tensor, Tensor], AttentionResult],
    ) -> AttentionResult:
        heads_BTHE, pattern = proceed(q_BHTE, k_BKTE, v_BKTE)
        calls[module] = _Call(q_BHTE, k_BKTE, v_BKTE, keywords, pattern)
        latest[:] = [(module, heads_BTHE.flatten(-2))]
        return heads_BTHE, pattern

    def saw_linear(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not latest:
            return
        attention, heads = latest[0]
        is_inside = any(module is part for part in attention.modules())
        if is_inside and arguments[0].numel() == heads.numel() and torch.equal(arguments[0].view_as(heads), heads):
            projections[attention] = module

    with ExitStack() as stack:
        for module in model.model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                stack.callback(module.register_forward_pre_hook(saw_linear).remove)
        stack.enter_context(observed_attention(model.model, EXACT, observe))
        model.model(probe_tokens(model), use_cache=False)
    return calls, projections


def _decoder_layers(model: nn.Module, attentions: list[nn.Module]) -> list[nn.Module]:
    """The module list whose i-th element holds the i-th attention module."""
    for modules in model.modules():
        if isinstance(modules, nn.ModuleList) and len(modules) == len(attentions):
            layers = list(modules)
            if all(attention in set(layer.modules()) for layer, attention in zip(layers, attentions, strict=True)):
                return layers
    raise ValueError(f"{type(model).__name__} keeps its {len(attentions)} attention modules in no list of layers; "
                     "choose a decoder-only model with one attention block a layer")  # fmt: skip


def _attention_spec(model: LanguageModel, layer: int, attention: nn.Module, call: _Call) -> AttentionSpec:
    """Read a layer's spec off the shapes and keywords of its attention call."""
    dims, got = model.dims, (call.q.shape[1], call.k.shape[1], call.q.shape[-1])
    if got != (dims.n_heads, dims.n_kv_heads, dims.head_dim):
        raise ValueError(f"layer {layer} attends with (heads, kv heads, width) {got}, the model's config says "
                         f"{(dims.n_heads, dims.n_kv_heads, dims.head_dim)}; choose a model whose layers are alike "
                         "and whose config is true")  # fmt: skip
    if call.v.shape != call.k.shape:
        raise ValueError(f"layer {layer}: keys have (heads, width) {got[1:]}, values "
                         f"{(call.v.shape[1], call.v.shape[-1])}; choose a model where they are alike")  # fmt: skip
    config: Any = getattr(attention, "config", model.model.config)
    layer_types = getattr(config, "layer_types", None)
    layer_type = layer_types[layer] if layer_types else None
    if layer_type not in _LAYER_TYPES:
        raise ValueError(f"layer {layer} uses {layer_type!r}; only full and sliding-window attention can be captured, "
                         "choose another model")  # fmt: skip
    window = call.keywords.get("sliding_window")
    if window is None and layer_type == "sliding_attention":
        window = config.sliding_window
    scaling, sinks = call.keywords.get("scaling"), call.keywords.get("s_aux")
    return AttentionSpec(
        n_heads=dims.n_heads,
        n_kv_heads=dims.n_kv_heads,
        head_dim=dims.head_dim,
        scale=dims.head_dim**-0.5 if scaling is None else float(scaling),
        softcap=call.keywords.get("softcap"),
        sliding_window=window,
        sinks=None if sinks is None else tuple(sinks.float().tolist()),
    )


def _check_spec(model: LanguageModel, layer: int, spec: AttentionSpec, call: _Call, tolerance: float) -> None:
    """Refuse a layer whose eager pattern is not the one its spec gives."""
    recomputed = attention_patterns(call.q.float(), call.k.float(), spec)
    if call.pattern is None or not torch.allclose(recomputed, call.pattern.float(), rtol=0, atol=tolerance):
        raise ValueError(
            f"model type {_model_type(model)!r}, layer {layer}: the attention pattern does not follow from q, k, "
            "scale, soft-cap, window and sinks (a position bias, or no causal mask?); choose another model"
        )


def _mlp_modules(layer: nn.Module, attention: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The child with weight matrices beside the attention, or the two linear maps that stand there instead (OPT)."""
    candidates = [
        child
        for child in layer.children()
        if attention not in set(child.modules()) and any(weight.ndim >= 2 for weight in child.parameters())
    ]
    if len(candidates) == 1 or (len(candidates) == 2 and all(isinstance(c, nn.Linear | Conv1D) for c in candidates)):
        return candidates[0], candidates[-1]
    return None
