import pytest
import torch
from torch.testing import assert_close

from crosshead.attention.positions import Positions
from crosshead.maths.patterns import attention_patterns, attention_scores
from tests.attention.cases import LENGTH, spec, tables

KINDS = [{"rotated": 6}, {"rotated": 4}, {"rotated": 6, "interleaved": True}, {"rotated": 4, "factor": 1.3}]


def positions(rotated: int = 6, interleaved: bool = False, factor: float = 1.0) -> Positions:
    module = Positions()
    module.set_(spec(rotary_interleaved=interleaved), tables(LENGTH, rotated, interleaved, factor))
    return module


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_rotating_and_undoing_it_are_inverse(kind):
    module, x = positions(**kind), draw(2, 3, LENGTH, 6)
    assert_close(module.unrotated(module.rotated(x)), x)
    assert_close(module.rotated(module.unrotated(x)), x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_is_the_product_of_rotated_vectors_at_every_pair(kind):
    module, a, b = positions(**kind), draw(5, 6), draw(5, 6, seed=1)
    rotated = [module.rotated(x[:, None].expand(5, LENGTH, 6)) for x in (a, b)]
    products = rotated[0] @ rotated[1].transpose(-1, -2)
    kernel = module.kernel_of(a, b) @ module.basis(6).T
    for t in range(LENGTH):
        for s in range(t + 1):
            assert_close(kernel[:, t - s], products[:, t, s], rtol=1e-4, atol=1e-5)


def test_without_rotation_a_kernel_is_the_plain_product():
    module, a, b = Positions(), draw(5, 6), draw(5, 6, seed=1)
    module.set_(spec(rotary=None), None)
    assert_close((module.kernel_of(a, b) @ module.basis(6).T)[:, 0], (a * b).sum(1))
    assert torch.equal(module.rotated(a[None]), a[None])


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}, {"softcap": 1.5}, {"sinks": (0.1, -1.0, 2.0, 0.3)}])
def test_patterns_equal_the_models_own(changes):
    module, attention = Positions(), spec(**changes)
    module.set_(attention, tables())
    q, k = draw(2, 4, LENGTH, 6), draw(2, 2, LENGTH, 6, seed=1)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[:, 0] = False
    allowed = module.allowed_with_first(mask)
    raw = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * attention.scale
    ours = module.log_pattern(raw, allowed, torch.arange(4)).exp() * allowed
    theirs = attention_patterns(q, k, attention)
    assert_close(ours[:, :, 1:], theirs[:, :, 1:], rtol=1e-4, atol=1e-6)
    open_keys = attention_scores(q, k, attention).isfinite()[:, :, 1:]
    assert torch.equal(allowed[:, :, 1:].expand_as(open_keys), open_keys)


def test_padding_and_the_first_token_are_no_keys():
    module = positions()
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    mask[0, 0] = mask[0, 9:] = False
    allowed = module.allowed(mask)[0, 0]
    assert not allowed[:, 0].any()
    assert not allowed[9:].any()
    assert allowed[5].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]


def test_longer_contexts_than_the_tables_are_refused():
    with pytest.raises(ValueError, match=f"hold {LENGTH} positions, the context has 20"):
        positions().unrotated(draw(1, 1, 20, 6))
