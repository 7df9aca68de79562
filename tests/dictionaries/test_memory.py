"""Training steps never hold a dense matrix of activations, nor anything larger."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crosshead.dictionaries.registry import build, config_class
from crosshead.maths.engine import Engine
from tests.dictionaries.cases import BASES, DIMS, SPARSITIES, random_batch

FEATURES, CONTEXTS, POSITIONS = 3000, 4, 16
ROWS = CONTEXTS * POSITIONS


class Largest(TorchDispatchMode):
    """Remembers the largest memory behind any result."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, size)
        return result


@pytest.mark.parametrize("form", SPARSITIES)
@pytest.mark.parametrize("base", ["mtc", "mtc-top1", "joint_mtc", "sae_best_head", "value_sae-two", "attn_out_sae"])
def test_no_tensor_of_a_step_has_as_many_elements_as_the_encoders_product(base, form):
    config = config_class(BASES[base]["kind"]).model_validate(
        BASES[base] | {"features": FEATURES, "sparsity": SPARSITIES[form] | {}}
    )
    module = build(config, DIMS).train()
    module.engine = Engine(tile_mib=0.01, form="sparse")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        module.encoder.bias -= 0.5
        if form == "jumprelu":
            module.encoder.log_threshold.fill_(-1.0)
    batch = random_batch(0, CONTEXTS, POSITIONS)
    with Largest() as largest:
        loss = module.loss(batch, 1.0)
        loss.total.backward()
        module.decode(module.encode(batch), batch)
    assert loss.l0 > 0
    weights = FEATURES * max(DIMS.d_model, *(parameter.shape[-1] for parameter in module.parameters()
                                             if len(parameter) == FEATURES and parameter.dim() == 2))  # fmt: skip
    assert weights < ROWS * FEATURES, "weights and their gradients may be as large as they are"
    assert largest.elements < ROWS * FEATURES
