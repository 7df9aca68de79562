"""Cross-entropy recovered: the base model run on the reconstruction instead of its own activation.

After Bricken et al., Towards Monosemanticity (2023): recovered = (ablated - spliced) / (ablated - clean). Ablation sets
the same sites to zero or to their training mean at the same positions; zero flatters, so both are reported and the mean
one is the default. The first token keeps its own activation throughout.
"""

import hashlib
from collections.abc import Iterable, Mapping, MutableMapping

import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.splice import run_with_prefix, splice
from crosshead.dictionaries.base import Batch, Dictionary, Site

__all__ = ["Splicing", "cross_entropy_recovered"]


class Splicing(BaseModel):
    """Next-token cross-entropies (nats, mean over predicted tokens) and what they say."""

    n_tokens: int
    """Predictions made from counted positions."""
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    delta_ce: float
    """Spliced minus clean."""
    kl: float
    """KL(clean || spliced) of the next-token distributions."""
    ce_recovered: float | None
    """Against mean ablation; None where ablation costs nothing."""
    ce_recovered_zero: float | None
    """Against zero ablation."""
    context_delta_ce: list[float]
    """Spliced minus clean per context, in order."""


@torch.no_grad()
def cross_entropy_recovered(
    module: Dictionary,
    model: LanguageModel,
    batches: Iterable[Batch],
    ablated: MutableMapping[str, float] | None = None,
) -> Splicing:
    """Splice a dictionary's reconstructions into the base model. All its target sites are replaced together.

    What an ablation costs does not depend on the dictionary. ``ablated`` remembers it, for others with the same
    targets: summed losses by a hash of the model, the tokens and what replaces their activations.
    """
    ablated = {} if ablated is None else ablated
    totals: dict[str, float] = dict.fromkeys(("clean", "spliced", "zero", "mean", "kl"), 0.0)
    per_context: list[float] = []
    n_tokens = 0
    lowest = min(site.layer for site in module.target_sites)
    for batch in batches:
        prediction = module.decode(module.encode(batch), batch)
        variants: dict[str, dict[Site, Tensor]] = {
            "spliced": module.denormalise(prediction),
            "mean": module.denormalise(torch.zeros_like(prediction)),
        }
        variants["zero"] = {site: torch.zeros_like(mean) for site, mean in variants["mean"].items()}
        predicted = batch.mask[:, :-1]
        logits, prefix = run_with_prefix(model, batch.tokens, lowest)
        reference = _log_probabilities(logits)
        clean = _next_token_loss(reference, batch.tokens) * predicted
        totals["clean"] += float(clean.double().sum())
        for name in ("mean", "zero"):
            key = _identity(model, batch, variants[name])
            if key not in ablated:
                logits = splice(model, batch.tokens, variants[name], batch.mask, prefix=prefix)
                losses = _next_token_loss(_log_probabilities(logits), batch.tokens) * predicted
                ablated[key] = float(losses.double().sum())
            totals[name] += ablated[key]
        logits = splice(model, batch.tokens, variants["spliced"], batch.mask, prefix=prefix)
        log_probabilities = _log_probabilities(logits)
        spliced = _next_token_loss(log_probabilities, batch.tokens) * predicted
        totals["spliced"] += float(spliced.double().sum())
        kl = functional.kl_div(log_probabilities, reference, reduction="none", log_target=True).sum(-1)
        totals["kl"] += float((kl * predicted).double().sum())
        counts = predicted.sum(1)
        per_context += ((spliced - clean).double().sum(1) / counts).tolist()
        n_tokens += int(counts.sum())
    if not n_tokens:
        raise ValueError("no held-out positions to splice; raise evaluation.splice_contexts")
    means = {name: total / n_tokens for name, total in totals.items()}
    return Splicing(
        n_tokens=n_tokens,
        ce_clean=means["clean"],
        ce_spliced=means["spliced"],
        ce_zero=means["zero"],
        ce_mean=means["mean"],
        delta_ce=means["spliced"] - means["clean"],
        kl=means["kl"],
        ce_recovered=_recovered(means, "mean"),
        ce_recovered_zero=_recovered(means, "zero"),
        context_delta_ce=per_context,
    )


def _identity(model: LanguageModel, batch: Batch, replacements: Mapping[Site, Tensor]) -> str:
    """What an ablated pass depends on, the arithmetic included."""
    machine = torch.backends.cpu.get_cpu_capability()
    if batch.tokens.is_cuda:
        machine = torch.cuda.get_device_name(batch.tokens.device)
    digest = hashlib.sha256(f"{model.fingerprint} {machine}".encode())
    parts = {"tokens": batch.tokens, "mask": batch.mask} | {str(site): t for site, t in replacements.items()}
    for name, tensor in parts.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _log_probabilities(logits: Float[Tensor, "B T V"]) -> Float[Tensor, "B T-1 V"]:
    return logits[:, :-1].float().log_softmax(-1)


def _next_token_loss(log_probabilities: Float[Tensor, "B T-1 V"], tokens: Tensor) -> Float[Tensor, "B T-1"]:
    return -log_probabilities.gather(-1, tokens[:, 1:, None])[..., 0]


def _recovered(means: dict[str, float], ablation: str) -> float | None:
    cost = means[ablation] - means["clean"]
    return None if abs(cost) < 1e-9 else (means[ablation] - means["spliced"]) / cost
