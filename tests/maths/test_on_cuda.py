"""The Triton kernels: in Triton's interpreter on the CPU, on a GPU where there is one."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from crosshead.maths import on_cuda, on_torch, scan, sparse
from crosshead.maths.engine import Engine
from crosshead.maths.forms import Product
from tests.dictionaries.cases import padded_batch
from tests.dictionaries.test_dense import compare as compare_dictionary
from tests.dictionaries.test_dense import perturbed
from tests.maths.test_sparse import Problem, compare

BACKENDS = {"triton": on_cuda, "torch": on_torch}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Compute everything with one backend, whatever the device."""
    module = BACKENDS[request.param]
    for user in (scan, sparse):
        monkeypatch.setattr(user, "backend", lambda device, dense=False: module)
    return module


@pytest.mark.parametrize(
    ("seed", "density", "few"),
    [
        (0, 0.0, False),
        (0, 0.1, True),
        (0, 1.0, False),
        (0, 1.0, True),
        (3, 0.1, False),
        (3, 0.1, True),
        (3, 1.0, False),
    ],
)
def test_every_gradient_equals_dense_autograd_in_float64(backend, seed, density, few):
    p = Problem(seed, density, contexts=1 + (seed > 0), positions=3, features=7 + 9 * seed, d_in=5, d_out=6,
                heads=1 + seed, device=DEVICE)  # fmt: skip
    compare(p, Engine(shares_mib=1e-3), 1e-10, p.movers if few else None)


def test_every_gradient_agrees_in_float32(backend):
    p = Problem(9, 0.1, contexts=2, positions=20, features=70, d_in=33, d_out=40, heads=9, dtype=torch.float32,
                device=DEVICE)  # fmt: skip
    compare(p, Engine(), 1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tile_mib", [1e-4, 8.0])
def test_selections_are_those_of_full_sorts(backend, seed, tile_mib):
    p = Problem(seed, 0.5, contexts=1, positions=9 + 28 * seed, features=20 + 60 * seed, device=DEVICE)
    product, engine = Product(p.x, p.weight, p.bias, p.mask), Engine(tile_mib=tile_mib)
    features = len(p.bias)
    scale, level = p.draw(features).abs(), p.draw(features)
    pre = p.x @ p.weight.T + p.bias
    active = (pre * scale > level) & p.mask[:, None]
    larger = scan.larger_entries(product, scale, level, engine)
    torch.testing.assert_close(larger.to_dense(), pre * active)
    assert torch.equal(torch.stack([larger.rows, larger.columns], 1), torch.nonzero(active))

    scores = pre * scale * p.mask[:, None]
    ranks = (-scores).argsort(dim=1, stable=True).argsort(dim=1)
    per_row = scan.largest_per_row(product, scale, 5, engine)
    torch.testing.assert_close(per_row.to_dense(), pre * ((ranks < 5) & (scores > 0)))
    best = scan.largest_entries(product, scale, 30, engine)
    assert len(best.values) == 30
    torch.testing.assert_close((best.values * scale[best.columns]).sum(), scores.flatten().topk(30).values.sum())


def test_bfloat16_products_give_float32_gradients_close_to_the_oracles(backend, monkeypatch):
    monkeypatch.setattr(sparse, "_working", lambda tensor: tensor.detach().bfloat16())
    p = Problem(9, 0.1, contexts=2, positions=20, features=70, d_in=33, d_out=40, heads=3, dtype=torch.float32,
                device=DEVICE)  # fmt: skip
    compare(p, Engine(), 3e-2)


def test_products_in_bfloat16_are_summed_in_float32():
    p = Problem(1, 0.3, contexts=1, positions=8, features=40, d_in=64, d_out=64, heads=3, dtype=torch.float32,
                device=DEVICE)  # fmt: skip
    codes = sparse.SparseCodes.from_dense(p.active * 1.0)
    table = p.decoder.bfloat16()
    out = on_cuda.weighted_rows(codes, table)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, codes.to_dense() @ table.float())


def test_widths_above_a_block_have_the_oracles_gradients():
    """Kernels go along the output in blocks of 64 and along the input in steps of 32: several of both."""
    p = Problem(5, 0.2, contexts=1, positions=6, features=40, d_in=70, d_out=150, heads=3, dtype=torch.float32,
                device=DEVICE)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for user in (scan, sparse):
            patch.setattr(user, "backend", lambda device, dense=False: on_cuda)
        compare(p, Engine(shares_mib=1e-3), 1e-5)
        compare(p, Engine(), 1e-5, p.movers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_selection_over_several_steps_of_the_input(dtype):
    """Entries that are clearly above or below their level, so that no rounding decides.

    In float16, because Triton's interpreter multiplies the bits of bfloat16 as whole numbers.
    """
    p = Problem(6, 0.5, contexts=1, positions=10, features=140, d_in=70, dtype=torch.float32, device=DEVICE)
    x, weight = p.x.to(dtype), p.weight.to(dtype)
    pre = x.float() @ weight.float().T + p.bias
    level = torch.zeros_like(p.bias)
    found = on_cuda.larger_entries(Product(x, weight, p.bias, p.mask), torch.ones_like(p.bias), level, Engine())
    active, clear = found.to_dense() != 0, pre.abs() > 0.05
    wanted = (pre > 0) & p.mask[:, None]
    assert torch.equal(active & clear, wanted & clear)
    assert 0.3 < float(active.float().mean()) < 0.7
    torch.testing.assert_close(found.values, pre[found.rows, found.columns], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("case", ["mtc/l1", "mtc-top1/batch_topk", "value_sae-two/jumprelu", "attn_out_sae/topk"])
def test_losses_of_dictionaries_are_those_of_the_dense_oracle(case, monkeypatch):
    """Penalties and threshold gradients on top of the kernels, in float64."""
    for user in (scan, sparse):
        monkeypatch.setattr(user, "backend", lambda device, dense=False: on_cuda)
    batch = padded_batch(101)
    sites = {site: tensor.to(DEVICE) for site, tensor in batch.sites.items()}
    batch = replace(batch, sites=sites, mask=batch.mask.to(DEVICE), tokens=batch.tokens.to(DEVICE))
    compare_dictionary(perturbed(case, 1).double().to(DEVICE), batch, 0.2)
