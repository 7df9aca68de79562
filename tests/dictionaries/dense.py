"""A dense oracle: every training loss written out plainly, with ordinary autograd and no sparse code.

It reads a module's configuration, parameters and buffers and calls none of its methods. The active entries are chosen
by full sorts, the patterns are applied head by head, and nothing is fast.

Shape legend: B contexts, T positions, N = B*T rows, F features, X input width, D target width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from crosshead.dictionaries.base import Batch, Dictionary, Site


class DenseLoss(NamedTuple):
    """What ``Dictionary.loss`` returns, and the dense activations [N, F] it comes from."""

    parts: dict[str, Tensor]
    l0: float
    normalised_mse: float
    fired: Tensor
    codes: Tensor


def dense_loss(module: Dictionary, batch: Batch, progress: float) -> DenseLoss:
    """The training loss of any architecture, in the dtype of the module."""
    forms = {
        "mtc": _mtc,
        "joint_mtc": _joint_mtc,
        "sae_best_head": _sae_best_head,
        "value_sae": _value_sae,
        "attn_out_sae": _attn_out_sae,
    }
    return forms[module.config.kind](module, batch, progress)


# ---- architectures ----


def _mtc(module, batch: Batch, progress: float) -> DenseLoss:
    config = module.config
    loadings_MF = module.loadings * _movers_left(module, progress)
    if config.loadings_penalty == "l1":
        size_F = loadings_MF.abs().sum(0)
    elif config.loadings_penalty == "l2":
        size_F = (loadings_MF**2).sum(0).sqrt()
    else:
        size_F = torch.einsum("mf,mn,nf->f", loadings_MF, module.pattern_gram, loadings_MF).sqrt()
    norms_F = size_F * (module.decoder**2).sum(1).sqrt()
    x_BTX = _layer_input(module, batch)
    f_NF, penalties = _activations(module, x_BTX.flatten(0, 1), norms_F, batch.mask.flatten(), progress)
    prediction = _moved(module, batch, f_NF, loadings_MF)
    return _result(prediction, _layer_target(module, batch), f_NF, batch.mask, penalties)


def _joint_mtc(module, batch: Batch, progress: float) -> DenseLoss:
    sae = _sae_best_head(module, batch, progress)
    loadings_MF = module.loadings * _movers_left(module, progress)
    prediction = _moved(module, batch, sae.codes.detach(), loadings_MF)
    parts = sae.parts | {"sae": sae.parts["reconstruction"]}
    del parts["reconstruction"]
    return _result(prediction, _layer_target(module, batch), sae.codes, batch.mask, parts)


def _sae_best_head(module, batch: Batch, progress: float) -> DenseLoss:
    x_BTX = _layer_input(module, batch)
    norms_F = (module.sae_decoder**2).sum(1).sqrt()
    f_NF, penalties = _activations(module, x_BTX.flatten(0, 1), norms_F, batch.mask.flatten(), progress)
    prediction = f_NF.view(*batch.mask.shape, -1) @ module.sae_decoder + module.sae_bias
    return _result(prediction, x_BTX, f_NF, batch.mask, penalties)


def _layer_input(module, batch: Batch) -> Tensor:
    x_BTX = batch[Site(module.config.layers[0], "resid_in")].to(module.encoder.weight.dtype)
    if module.config.input == "normed":
        x_BTX = x_BTX / (x_BTX**2).mean(-1, keepdim=True).sqrt()
    return (x_BTX - module.input_mean) * module.input_scale


def _layer_target(module, batch: Batch) -> Tensor:
    y_BTD = batch[Site(module.config.layers[0], module.config.target)].to(module.decoder.dtype)
    return (y_BTD - module.target_mean) * module.target_scale


def _moved(module, batch: Batch, f_NF: Tensor, loadings_MF: Tensor) -> Tensor:
    f_BTF = f_NF.view(*batch.mask.shape, -1)
    prediction = module.decoder_bias + (f_BTF * loadings_MF[0]) @ module.decoder
    for h in range(module.dims.n_heads):
        pattern_BTT = batch[Site(module.config.layers[0], "pattern")][:, h].to(module.decoder.dtype)
        prediction = prediction + pattern_BTT @ (f_BTF * loadings_MF[h + 1]) @ module.decoder
        prediction = prediction + pattern_BTT[:, :, :1] * module.bos[h]
    return prediction


def _movers_left(module, progress: float) -> Tensor:
    """The share of every loading that is in force, [M, F]: 1 for kept movers, fading to 0 for the others."""
    config, (n_movers, n_features) = module.config, module.loadings.shape
    left_MF = torch.ones_like(module.loadings)
    if config.heads_per_feature == "all":
        return left_MF
    for i in range(n_features):
        if config.assignment == "fixed":
            kept, fading = {int(module.fixed_movers[i])}, 0.0
        else:
            sizes = module.loadings[:, i].abs().tolist()
            kept = set(sorted(range(n_movers), key=sizes.__getitem__, reverse=True)[: config.heads_per_feature])
            begin, end = config.selection
            fading = 1.0 if progress <= begin else max(0.0, 1.0 - (progress - begin) / (end - begin))
        for m in range(n_movers):
            left_MF[m, i] = 1.0 if m in kept else fading
    return left_MF.detach()


def _value_sae(module, batch: Batch, progress: float) -> DenseLoss:
    layers_BTD = []
    for i, layer in enumerate(module.config.layers):
        v_BKTE = batch[Site(layer, "v")].to(module.decoder.dtype)
        v_BTD = torch.cat([v_BKTE[:, k] for k in range(module.dims.n_kv_heads)], dim=-1)
        width = v_BTD.shape[-1]
        layers_BTD.append((v_BTD - module.means[i * width : (i + 1) * width]) * module.scales[i])
    widths = [layer.shape[-1] for layer in layers_BTD]
    if module.config.norm == "whole":
        norms_F = (module.decoder**2).sum(1).sqrt()
    else:
        norms_F = torch.stack([(part**2).sum(1).sqrt() for part in module.decoder.split(widths, dim=1)]).sum(0)
    return _autoencoder(module, torch.cat(layers_BTD, dim=-1), norms_F, batch.mask, progress)


def _attn_out_sae(module, batch: Batch, progress: float) -> DenseLoss:
    (layer,) = module.config.layers
    dtype, dims = module.decoder.dtype, module.dims
    if module.config.per_head:
        heads = []
        for h in range(dims.n_heads):
            v_BTE = batch[Site(layer, "v")][:, h // (dims.n_heads // dims.n_kv_heads)].to(dtype)
            heads.append(batch[Site(layer, "pattern")][:, h].to(dtype) @ v_BTE)
        x_BTD = torch.cat(heads, dim=-1)
    else:
        x_BTD = batch[Site(layer, "attn_out")].to(dtype)
    norms_F = (module.decoder**2).sum(1).sqrt()
    return _autoencoder(module, (x_BTD - module.means) * module.scales, norms_F, batch.mask, progress)


def _autoencoder(module, x_BTD: Tensor, norms_F: Tensor, mask_BT: Tensor, progress: float) -> DenseLoss:
    f_NF, penalties = _activations(module, x_BTD.flatten(0, 1), norms_F, mask_BT.flatten(), progress)
    prediction = f_NF.view(*mask_BT.shape, -1) @ module.decoder + module.decoder_bias
    return _result(prediction, x_BTD, f_NF, mask_BT, penalties)


def _result(
    prediction_BTD: Tensor, y_BTD: Tensor, f_NF: Tensor, mask_BT: Tensor, penalties: dict[str, Tensor]
) -> DenseLoss:
    error = ((prediction_BTD - y_BTD) ** 2)[mask_BT].sum()
    parts = {"reconstruction": error / mask_BT.sum()} | penalties
    l0 = float((f_NF > 0).sum() / mask_BT.sum())
    normalised_mse = float(error.detach() / (y_BTD[mask_BT] ** 2).sum())
    return DenseLoss(parts, l0, normalised_mse, (f_NF > 0).any(0), f_NF)


# ---- sparsities ----


def _activations(
    module, x_NX: Tensor, norms_F: Tensor, mask_N: Tensor, progress: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Activations [N, F] in training mode, and the penalties."""
    sparsity, encoder = module.config.sparsity, module.encoder
    counted_N1 = mask_N[:, None].to(x_NX.dtype)
    n_counted = mask_N.sum()
    pre_NF = x_NX @ encoder.weight.T + encoder.bias
    warm = min(1.0, progress / sparsity.warmup_fraction) if sparsity.kind in ("l1", "jumprelu") else 0.0

    if sparsity.kind == "l1":
        f_NF = torch.relu(pre_NF) * counted_N1
        penalties = {"sparsity": sparsity.coefficient * warm * (f_NF * norms_F).sum() / n_counted}
        if sparsity.negative_coefficient:
            shortfall_NF = torch.relu(-pre_NF) * counted_N1
            penalties["negative"] = sparsity.negative_coefficient * warm * (shortfall_NF * norms_F).sum() / n_counted
        return f_NF, penalties

    if sparsity.kind == "jumprelu":
        theta_F = encoder.log_threshold.exp()
        on_NF = (pre_NF > theta_F).to(pre_NF) * counted_N1
        # The surrogate gradients of Rajamanoharan et al.: a kernel of width eps stands for the step's derivative. The
        # term beside ``on`` is zero and has that derivative.
        kernel_NF = ((pre_NF - theta_F).abs() < sparsity.bandwidth / 2).to(pre_NF) / sparsity.bandwidth * counted_N1
        moved_F = theta_F - theta_F.detach()
        f_NF = pre_NF * on_NF - theta_F.detach() * kernel_NF * moved_F
        penalties = {"sparsity": sparsity.coefficient * warm * (on_NF - kernel_NF * moved_F).sum() / n_counted}
        if sparsity.negative_coefficient:
            shortfall_NF = torch.relu(theta_F - pre_NF) * counted_N1
            penalties["negative"] = sparsity.negative_coefficient * warm * (shortfall_NF * norms_F).sum() / n_counted
        return f_NF, penalties

    share = min(1.0, progress / sparsity.anneal_fraction)
    k = sparsity.k * (1 - share) * sparsity.anneal_from + sparsity.k * share
    scores_NF = (torch.relu(pre_NF) * norms_F * counted_N1).detach()
    on_NF = torch.zeros_like(scores_NF)
    if sparsity.kind == "batch_topk":
        best = scores_NF.flatten().sort(descending=True, stable=True).indices[: round(k * int(n_counted))]
        on_NF.view(-1)[best] = 1.0
    else:
        for row in range(len(scores_NF)):
            on_NF[row, scores_NF[row].sort(descending=True, stable=True).indices[: round(k)]] = 1.0
    # An entry that is not positive is never active, however few there are.
    return torch.relu(pre_NF) * on_NF * (scores_NF > 0), {}
