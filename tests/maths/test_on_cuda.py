"""The Triton kernels: in Triton's interpreter on the CPU, on a GPU where there is one."""

import pytest
import torch

pytest.importorskip("triton")

from crosshead.maths import on_cuda, on_torch, scan, sparse
from crosshead.maths.engine import Engine
from crosshead.maths.forms import Product
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
