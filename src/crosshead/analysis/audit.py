"""Recompute a run's normalised MSE from its files, with stock transformers and dense arithmetic only.

Nothing of our capture, cache, encoder, decoder or evaluation is used: activations come from ``output_hidden_states``,
``output_attentions`` (eager) and two plain hooks, weights from the run's safetensors file, and the formulas stand here
a second time, dense and unoptimised. An error in the fast path therefore shows as a difference.

Shape legend: B contexts, T positions, F features, H query heads, K key/value heads, E head width, D target width.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from crosshead.io.files import read_json

__all__ = ["Recomputed", "audit_runs"]

_ATTENTION_NAMES = ("self_attn", "attn", "attention")


class Recomputed(NamedTuple):
    """What the audit found for one run."""

    normalised_mse: float | None
    """None where it could not be recomputed."""
    reason: str | None
    """Why not."""


def audit_runs(
    run_directories: dict[str, Path], model_directory: Path, tokens: Int[Tensor, "n T"], contexts_per_batch: int = 2
) -> dict[str, Recomputed]:
    """Normalised MSE of every run on held-out ``tokens`` (position 0 is the beginning-of-text token).

    One pass of the stock eager model serves all runs. Runs that read values of a model whose value projection is fused
    with queries and keys (GPT-2, GPT-NeoX) are left out, with that reason.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_directory, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    ).eval()
    runs = {name: _Run(path) for name, path in run_directories.items()}
    layers = sorted({layer for run in runs.values() for layer in run.layers})
    separate = {layer for layer in layers if _value_projection(model, layer) is not None}
    audited = {name: run for name, run in runs.items() if not run.reads_values or separate >= set(run.layers)}
    squared = dict.fromkeys(audited, 0.0)
    variance = dict.fromkeys(audited, 0.0)
    for activations in _activations(model, tokens, layers, contexts_per_batch):
        for name, run in audited.items():
            prediction, target = run.predict(activations)
            squared[name] += float((prediction - target)[:, 1:].double().square().sum())
            variance[name] += float(target[:, 1:].double().square().sum())
    fused = Recomputed(None, "the model computes values in one product with queries and keys; not audited")
    return {name: Recomputed(squared[name] / variance[name], None) if name in audited else fused for name in runs}


@torch.no_grad()
def _activations(model: Any, tokens: Tensor, layers: Sequence[int], size: int) -> Iterator[dict[str, Tensor]]:
    """Activations of a few contexts at a time, named ``{layer}.`` resid, resid_out, pattern, attn and v."""
    seen: dict[str, Tensor] = {}
    handles = []
    for layer in layers:
        attention = model.get_submodule(_attention_name(model, layer))
        # A hook, because the last of output_hidden_states is taken after the final norm.
        block = model.get_submodule(_attention_name(model, layer).rpartition(".")[0])
        handles.append(block.register_forward_hook(_record(seen, f"{layer}.resid_out")))
        handles.append(attention.register_forward_hook(_record(seen, f"{layer}.attn")))
        projection = _value_projection(model, layer)
        if projection is not None:
            handles.append(projection.register_forward_hook(_record(seen, f"{layer}.v")))
    try:
        for chunk in tokens.split(size):
            seen.clear()
            out = model(chunk, output_hidden_states=True, output_attentions=True, use_cache=False)
            for layer in layers:
                seen[f"{layer}.resid"] = out.hidden_states[layer]
                seen[f"{layer}.pattern"] = out.attentions[layer]
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _record(seen: dict[str, Tensor], key: str) -> Any:
    def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
        seen[key] = output[0] if isinstance(output, tuple) else output

    return hook


def _attention_name(model: Any, layer: int) -> str:
    for name, _ in model.named_modules():
        parts = name.split(".")
        if parts[-1] in _ATTENTION_NAMES and len(parts) > 1 and parts[-2] == str(layer):
            return name
    raise ValueError(f"no attention module found in layer {layer}; the audit looks for {', '.join(_ATTENTION_NAMES)}")


def _value_projection(model: Any, layer: int) -> nn.Module | None:
    return getattr(model.get_submodule(_attention_name(model, layer)), "v_proj", None)


class _Run:
    """One run's weights and the dense formulas of its architecture."""

    def __init__(self, path: Path):
        description = read_json(path / "dictionary.json")
        self.config: dict[str, Any] = description["config"]
        self.dims: dict[str, int] = description["dims"]
        self.w: dict[str, Tensor] = load_file(path / "weights.safetensors")
        self.layers: list[int] = self.config["layers"]
        self.reads_values: bool = self.config["kind"] == "value_sae" or self.config.get("per_head", False)

    def predict(self, a: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Prediction and target [B, T, D] in the run's normalised units."""
        forms = {"mtc": self._mtc, "joint_mtc": self._joint, "sae_best_head": self._best_head}
        return forms.get(self.config["kind"], self._autoencoder)(a)

    def _codes(self, x: Float[Tensor, "B T X"], norms: Tensor) -> Float[Tensor, "B T F"]:
        pre = x @ self.w["encoder.weight"].T + self.w["encoder.bias"]
        sparsity = self.config["sparsity"]
        if sparsity["kind"] == "l1":
            codes = pre.clamp(min=0)
        elif sparsity["kind"] == "batch_topk":
            codes = pre * ((pre * norms > self.w["encoder.threshold"]) & (pre > 0))
        elif sparsity["kind"] == "jumprelu":
            codes = pre * (pre > self.w["encoder.log_threshold"].exp())
        else:
            codes = pre.clamp(min=0)
            cut = (codes * norms).topk(sparsity["k"], dim=-1).values[..., -1:]
            codes = codes * (codes * norms >= cut)
        codes[:, 0] = 0.0
        return codes

    def _mtc(self, a: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        config, w = self.config, self.w
        loadings = self._kept_loadings()
        if config["loadings_penalty"] == "gram":
            size = torch.einsum("hf,hg,gf->f", loadings, w["pattern_gram"], loadings).clamp(min=1e-12).sqrt()
        elif config["loadings_penalty"] == "l1":
            size = loadings.abs().sum(0)
        else:
            size = loadings.norm(dim=0)
        return self._moved(a, size * w["decoder"].norm(dim=1), loadings)

    def _joint(self, a: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._moved(a, self.w["sae_decoder"].norm(dim=1), self._kept_loadings())

    def _moved(self, a: dict[str, Tensor], norms: Tensor, loadings: Tensor) -> tuple[Tensor, Tensor]:
        """Codes that compete by ``norms``, moved by patterns with ``loadings``."""
        w, pattern = self.w, a[f"{self.layers[0]}.pattern"]
        codes = self._codes(self._layer_input(a), norms)
        y = (codes * loadings[0]) @ w["decoder"] + w["decoder_bias"]
        for h in range(pattern.shape[1]):
            y = y + pattern[:, h] @ ((codes * loadings[h + 1]) @ w["decoder"]) + pattern[:, h, :, :1] * w["bos"][h]
        return y, self._layer_target(a)

    def _best_head(self, a: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Every feature of a context through the head that moves it most there."""
        w, pattern = self.w, a[f"{self.layers[0]}.pattern"]
        codes = self._codes(self._layer_input(a), w["sae_decoder"].norm(dim=1))
        group = pattern.shape[1] // w["to_value"].shape[1]
        written = torch.stack([w["sae_decoder"] @ w["to_value"][:, h // group] @ w["W_O"][h]
                               for h in range(pattern.shape[1])]) * w["target_scale"]  # fmt: skip
        y = w["bias"].expand(*codes.shape[:2], -1).clone()
        best = torch.stack([(pattern[:, h] @ codes)[:, 1:].abs().sum(1) * written[h].norm(dim=1)
                            for h in range(pattern.shape[1])]).argmax(0)  # fmt: skip
        for h in range(pattern.shape[1]):
            own = codes * (best == h)[:, None]
            y = y + w["gains"][h] * (pattern[:, h] @ own) @ written[h] + pattern[:, h, :, :1] * w["bos"][h]
        return y, self._layer_target(a)

    def _layer_input(self, a: dict[str, Tensor]) -> Float[Tensor, "B T X"]:
        x = a[f"{self.layers[0]}.resid"]
        if self.config["input"] == "normed":
            x = x / x.square().mean(-1, keepdim=True).sqrt()
        return (x - self.w["input_mean"]) * self.w["input_scale"]

    def _layer_target(self, a: dict[str, Tensor]) -> Float[Tensor, "B T D"]:
        raw = a[f"{self.layers[0]}.attn" if self.config["target"] == "attn_out" else f"{self.layers[0]}.resid_out"]
        return (raw - self.w["target_mean"]) * self.w["target_scale"]

    def _kept_loadings(self) -> Tensor:
        loadings, kept = self.w["loadings"], self.config["heads_per_feature"]
        if kept == "all":
            return loadings
        if self.config["assignment"] == "fixed":
            return loadings * nn.functional.one_hot(self.w["fixed_movers"], len(loadings)).T
        order = loadings.abs().argsort(dim=0, descending=True).argsort(dim=0)
        return loadings * (order < kept)

    def _autoencoder(self, a: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        w, raw = self.w, self._raw(a)
        widths = torch.tensor([r.shape[-1] for r in raw])
        x = (torch.cat(raw, dim=-1) - w["means"]) * w["scales"].repeat_interleave(widths)
        blocks = w["decoder"].split(widths.tolist(), dim=1)
        if self.config.get("norm", "sum_of_layers") == "whole":
            norms = w["decoder"].norm(dim=1)
        else:
            norms = torch.stack([block.norm(dim=1) for block in blocks]).sum(0)
        return self._codes(x, norms) @ w["decoder"] + w["decoder_bias"], x

    def _raw(self, a: dict[str, Tensor]) -> list[Tensor]:
        if self.config["kind"] == "attn_out_sae" and not self.config["per_head"]:
            return [a[f"{self.layers[0]}.attn"]]
        values = [a[f"{layer}.v"] for layer in self.layers]
        if self.config["kind"] == "value_sae":
            return values
        pattern = a[f"{self.layers[0]}.pattern"]
        heads = values[0].unflatten(-1, (self.dims["n_kv_heads"], -1)).transpose(1, 2)
        heads = heads.repeat_interleave(self.dims["n_heads"] // self.dims["n_kv_heads"], dim=1)
        return [(pattern @ heads).transpose(1, 2).flatten(2)]
