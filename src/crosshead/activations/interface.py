"""The one place that touches transformers' attention registry.

Two attention functions are registered under our own names. Each hands q (after rotary embedding and norms), k and v
(with their own number of heads) to the observer that is active, and then lets the original function do its work:

- ``EXACT`` calls the family's own eager function: the definition of the model, soft-caps and sinks included, and the
  one that returns patterns;
- ``FAST`` calls scaled_dot_product_attention, which knows neither soft-caps nor sinks.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

__all__ = ["EXACT", "FAST", "AttentionObserver", "AttentionResult", "observed_attention"]

EXACT = "crosshead_eager"
FAST = "crosshead_sdpa"

AttentionResult = tuple[Tensor, Tensor | None]


class AttentionObserver(Protocol):
    """What sees every attention call of a forward pass."""

    def __call__(
        self,
        module: nn.Module,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTE: Tensor,
        keywords: dict[str, Any],
        proceed: Callable[[Tensor, Tensor, Tensor], AttentionResult],
    ) -> AttentionResult:
        """Return ``proceed(q, k, v)``: head outputs [B,T,H,E] and, from EXACT, the pattern [B,H,T,T]."""
        ...


_observer: ContextVar[AttentionObserver | None] = ContextVar("crosshead_attention_observer", default=None)


def _family_eager(module: nn.Module, *arguments: Any, **keywords: Any) -> AttentionResult:
    """Call ``eager_attention_forward`` of the modeling file that defines the attention module."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function(module, *arguments, **keywords)
    raise ValueError(f"{type(module).__name__} has no eager attention function beside it; "
                     "its family cannot be captured, choose another model")  # fmt: skip


def _observed(function: Callable[..., AttentionResult]) -> Callable[..., AttentionResult]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
    ) -> AttentionResult:
        def proceed(q: Tensor, k: Tensor, v: Tensor) -> AttentionResult:
            return function(module, q, k, v, attention_mask, **keywords)

        observer = _observer.get()
        if observer is None:
            return proceed(query, key, value)
        return observer(module, query, key, value, keywords, proceed)

    return attend


AttentionInterface.register(EXACT, _observed(_family_eager))
AttentionMaskInterface.register(EXACT, eager_mask)
AttentionInterface.register(FAST, _observed(sdpa_attention_forward))
AttentionMaskInterface.register(FAST, sdpa_mask)


@contextmanager
def observed_attention(model: nn.Module, implementation: str, observer: AttentionObserver) -> Iterator[None]:
    """Run the model's attention through ``implementation`` (EXACT or FAST) with ``observer`` looking on.

    The model's own implementation is put back afterwards, whatever happens inside.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    before = [(config, config._attn_implementation) for config in configs.values()
              if hasattr(config, "_attn_implementation")]  # fmt: skip
    token = _observer.set(observer)
    try:
        for config, _ in before:
            config._attn_implementation = implementation
        yield
    finally:
        _observer.reset(token)
        for config, original in before:
            config._attn_implementation = original
