"""How a model rotates q and k, found out by holding everything else constant.

When a layer is fed the same vector at every position, its queries and keys differ between positions by the rotary
embedding alone (learned position embeddings change the residual stream, which is held constant). So the convention
that makes them equal again is the right one, and it is checked on the model itself instead of being looked up.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosshead.activations.interface import EXACT, AttentionResult, observed_attention
from crosshead.maths.patterns import undo_rotation

__all__ = ["ConstantRun", "RotaryStyle", "Tables", "change_input", "read_tables", "rewrite_input", "rotary_style",
           "run_on_constant_inputs"]  # fmt: skip

Tables = tuple[Float[Tensor, "T R"], Float[Tensor, "T R"]]

_INPUT_NAMES = ("hidden_states", "x", "input")


class RotaryStyle(NamedTuple):
    """How a family lays out its rotary tables and pairs coordinates."""

    layout: Literal["half", "interleaved", "single"]
    """Columns of the family's table: ``half`` f0 f1 .. f0 f1 .., ``interleaved`` f0 f0 f1 f1 .., ``single`` f0 f1 .."""
    interleaved: bool
    """Coordinates pair as (0,1),(2,3)...; otherwise j pairs with j + R/2."""


class ConstantRun(NamedTuple):
    """What the attention modules saw while every layer was fed position 0's vector at all positions."""

    queries_keys: dict[nn.Module, Float[Tensor, "1 heads T E"]]
    """q and k, stacked over heads."""
    tables: dict[nn.Module, Tables]
    """The cos and sin each module was given, as its family lays them out."""


def change_input(
    arguments: tuple[Any, ...], keywords: dict[str, Any], change: Callable[[Tensor], Tensor | None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A call's arguments with the first input (positional or the hidden states by name) changed; None: left alone."""
    name = None if arguments else next(name for name in _INPUT_NAMES if name in keywords)
    changed = change(arguments[0] if name is None else keywords[name])
    if changed is None:
        return None
    return ((changed, *arguments[1:]), keywords) if name is None else (arguments, {**keywords, name: changed})


@contextmanager
def rewrite_input(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Pass a module's first input (positional or the hidden states by name) through ``change``; None keeps it."""

    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any] | None:
        return change_input(arguments, keywords, change)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def run_on_constant_inputs(
    model: nn.Module, tokens: Tensor, layers: Sequence[nn.Module], attentions: Sequence[nn.Module]
) -> ConstantRun:
    """One forward pass of ``tokens`` [1, T] in which every layer reads the same vector at every position."""
    run = ConstantRun({}, {})

    def observe(
        module: nn.Module,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTE: Tensor,
        keywords: dict[str, Any],
        proceed: Callable[[Tensor, Tensor, Tensor], AttentionResult],
    ) -> AttentionResult:
        run.queries_keys[module] = torch.cat((q_BHTE, k_BKTE), dim=1).float()
        return proceed(q_BHTE, k_BKTE, v_BKTE)

    def saw_attention(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tables = _tables_among((keywords.get("position_embeddings"), *arguments), tokens.shape[1])
        if tables is not None:
            run.tables[module] = tables

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(rewrite_input(layer, lambda x: x[:, :1].expand_as(x)))
        for attention in attentions:
            stack.callback(attention.register_forward_pre_hook(saw_attention, with_kwargs=True).remove)
        stack.enter_context(observed_attention(model, EXACT, observe))
        model(tokens, use_cache=False)
    return run


@torch.no_grad()
def read_tables(model: nn.Module, tokens: Tensor, attention: nn.Module, style: RotaryStyle) -> Tables:
    """The cos and sin a rotating module is given for ``tokens`` [1, T], as ``undo_rotation`` wants them."""
    seen: list[Tables | None] = []

    def saw_attention(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append(_tables_among((keywords.get("position_embeddings"), *arguments), tokens.shape[1]))
        raise _SeenError

    handle = attention.register_forward_pre_hook(saw_attention, with_kwargs=True)
    try:
        with suppress(_SeenError):
            model(tokens, use_cache=False)
    finally:
        handle.remove()
    tables = seen[0]
    assert tables is not None, "a style is known only where tables were given"
    return _unify_table(tables[0], style), _unify_table(tables[1], style)


class _SeenError(Exception):
    """Ends a forward pass when the tables have been read."""


def _tables_among(values: Iterable[Any], length: int) -> Tables | None:
    """The pair of tensors among an attention module's arguments."""
    for value in values:
        if isinstance(value, tuple) and len(value) == 2 and all(isinstance(table, Tensor) for table in value):
            cos, sin = (table.float().reshape(-1, length, table.shape[-1])[0] for table in value)
            return cos, sin
    return None


def _unify_table(table_TR: Tensor, style: RotaryStyle) -> Float[Tensor, "T R"]:
    """A family's table rewritten with every frequency twice, as ``undo_rotation`` pairs coordinates."""
    match style.layout:
        case "half":
            frequencies = table_TR[:, : table_TR.shape[1] // 2]
        case "interleaved":
            frequencies = table_TR[:, ::2]
        case "single":
            frequencies = table_TR
    return frequencies.repeat_interleave(2, dim=1) if style.interleaved else torch.cat((frequencies, frequencies), 1)


def rotary_style(run: ConstantRun, attention: nn.Module, tolerance: float) -> RotaryStyle | None:
    """The convention that undoes one module's rotation to within ``tolerance`` (relative); None: it does not rotate.

    ValueError where q or k are rotated and no convention undoes it.
    """
    both = run.queries_keys[attention]
    if _spread(both) < tolerance:
        return None
    spreads: dict[RotaryStyle, float] = {}
    cos, sin = run.tables.get(attention, (None, None))
    if cos is not None and sin is not None:
        for layout in ("half", "interleaved", "single"):
            for interleaved in (False, True):
                style = RotaryStyle(layout, interleaved)
                cos_TR, sin_TR = _unify_table(cos, style), _unify_table(sin, style)
                if cos_TR.shape[1] <= both.shape[-1]:
                    spreads[style] = _spread(undo_rotation(both, cos_TR, sin_TR, interleaved=interleaved))
    best = min(spreads, key=lambda style: spreads[style], default=None)
    # `not <=` also refuses a spread that is not a number.
    if best is None or not spreads[best] <= tolerance:
        raise ValueError(f"{type(attention).__name__} turns q and k by position in a way that no known rotary"
                         " convention undoes; choose another model")  # fmt: skip
    return best


def _spread(x: Tensor) -> float:
    """Largest difference from position 0, relative to the largest value."""
    return float((x - x[:, :, :1]).abs().max() / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny))
