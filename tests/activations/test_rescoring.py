import pytest
import torch
from torch.testing import assert_close

from crosshead.activations.capture import attention_specs, capture
from crosshead.activations.rescoring import run_rescored
from crosshead.dictionaries.base import Site

FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2")


def some_tokens() -> torch.Tensor:
    tokens = torch.randint(1, 250, (2, 14), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_unchanged_scores_change_nothing(family, tiny_model):
    model, tokens = tiny_model(family), some_tokens()
    logits, pattern = run_rescored(model, tokens, 1, lambda scores: scores)
    assert_close(logits, model.model(tokens).logits, rtol=1e-4, atol=1e-4)
    own = capture(model, tokens, [Site(1, "pattern")])[Site(1, "pattern")]
    assert_close(pattern, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_scores_give_the_pattern_that_their_softmax_is(family, tiny_model):
    model, tokens = tiny_model(family), some_tokens()
    wanted = torch.randn(2, 4, 14, 14, generator=torch.Generator().manual_seed(1))
    _, pattern = run_rescored(model, tokens, 1, lambda scores: wanted)
    spec = attention_specs(model, [1])[1]
    capped = wanted if spec.softcap is None else spec.softcap * torch.tanh(wanted / spec.softcap)
    place = torch.arange(14)
    distance = place[:, None] - place
    allowed = (distance >= 0) & (distance < (spec.sliding_window or 99))
    assert_close(pattern, capped.masked_fill(~allowed, -torch.inf).softmax(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_later_model_sees_the_changed_pattern(family, tiny_model):
    """Against the head outputs computed by hand from the changed pattern."""
    model, tokens = tiny_model(family), some_tokens()

    def only_previous(scores: torch.Tensor) -> torch.Tensor:
        changed = scores.clone()
        place = torch.arange(14)
        changed[:, 2, place[1:], place[:-1]] += 50.0
        return changed

    seen = {}
    attention = model.model.model.layers[1].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _, arguments: seen.update(z=arguments[0]))
    try:
        logits, pattern = run_rescored(model, tokens, 1, only_previous)
    finally:
        handle.remove()
    v = capture(model, tokens, [Site(1, "v")])[Site(1, "v")].repeat_interleave(2, 1)
    z = (pattern @ v).transpose(1, 2).flatten(2)
    assert_close(seen["z"], z, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits, model.model(tokens).logits, atol=1e-3)
