"""What is timed against each other must compute the same thing."""

import pytest
import torch

from benchmarks.ours import at_l0, naive_mtc_loss
from tests.analysis.test_evaluation import ready


@pytest.mark.parametrize("feature_side", [True, False])
def test_naive_and_sparse_steps_have_the_same_loss_and_gradients(feature_side):
    trained, batches = ready("mtc/topk")
    batch = batches[0]
    module = at_l0(trained, batch, "l1", 4).double().train()
    naive = naive_mtc_loss(module, batch, feature_side=feature_side)
    expected = torch.autograd.grad(naive, list(module.parameters()))
    loss = module.loss(batch, 1.0).total
    torch.testing.assert_close(loss, naive, rtol=1e-9, atol=0)
    for got, wanted in zip(torch.autograd.grad(loss, list(module.parameters())), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["topk", "batch_topk", "l1", "l1-pre", "jumprelu"])
def test_biases_are_shifted_until_as_many_features_are_active(form):
    trained, batches = ready("mtc/topk")
    batch = batches[0]
    module = at_l0(trained, batch, form, 4).train()
    with torch.no_grad():
        active = int((module.encode(batch).values != 0).sum())
    assert active == pytest.approx(4 * int(batch.mask.sum()), rel=0.02)
