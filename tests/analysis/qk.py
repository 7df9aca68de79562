"""A small QK diagonalization of a tiny model's layer, trained for a moment."""

import torch

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.capture import attention_specs, capture, rotary_tables
from crosshead.attention.qk_diagonal import Config, Module
from crosshead.dictionaries.base import Batch

LAYER, LENGTH = 1, 24


def batches_of(model: LanguageModel, module: Module, n: int, seed: int) -> list[Batch]:
    tokens = torch.randint(1, 250, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[:, 0] = False
    return [Batch(capture(model, chunk, module.sites), mask[: len(chunk)], chunk) for chunk in tokens.split(2)]


def trained(model: LanguageModel, steps: int = 30, **changes) -> tuple[Module, list[Batch]]:
    """The module in eval mode, and batches that it has not seen."""
    settings = {
        "layers": [LAYER],
        "features": 24,
        "sparsity": {"kind": "batch_topk", "k": 8},
        "heads": [1, 2],
    } | changes
    module = Module(Config.model_validate(settings), model.dims)
    module.use_attention_(attention_specs(model, [LAYER])[LAYER], rotary_tables(model, LAYER, 2 * LENGTH))
    train = batches_of(model, module, 12, 0)
    module.train()
    module.start_(train, {}, torch.Generator().manual_seed(0))
    groups = [{"params": g.parameters, "lr": 2e-3 * g.multiplier} for g in module.parameter_groups()]
    optimiser = torch.optim.Adam(groups)
    for step in range(steps):
        optimiser.zero_grad()
        module.loss(train[step % len(train)], step / steps).total.backward()
        optimiser.step()
        module.project_()
    module.calibrate_(train)
    return module.eval(), batches_of(model, module, 6, 1)
