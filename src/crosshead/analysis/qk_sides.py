"""What one side of a feature responds to, in tokens: one token, a piece of one, capitals, a class of words, or more.

A side's mass is its summed activation by token. It gets the finest grain that holds at least 60% of the mass, and twice
what the grain holds of all positions (design choice; after the grains in which Jermyn et al., Progress on Attention,
2025, found induction features):

    token            one token
    word             one word, whatever its case and its leading space
    substring        two or more letters that the tokens share
    capitalisation   all capitals, or a capital first
    word class       starts a word, goes on with one, digits, punctuation, white space
    broad            none of these
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["describe_side", "same_grain"]

_SHARE, _LIFT = 0.6, 2.0
_SHOWN = 8
_CLASSES: dict[str, Callable[[str], bool]] = {
    "digits": lambda text: any(map(str.isdigit, text)),
    "white space": lambda text: not text.strip(),
    "punctuation": lambda text: bool(text.strip()) and not any(map(str.isalnum, text)),
    "starts a word": lambda text: text[:1].isspace() and text.strip()[:1].isalpha(),
    "goes on with a word": lambda text: text[:1].isalpha(),
}
_CAPITALS: dict[str, Callable[[str], bool]] = {
    "all capitals": lambda text: len(text.strip()) > 1 and text.strip().isupper(),
    "capital first": lambda text: text.strip()[:1].isupper(),
}


def describe_side(mass: Mapping[str, float], everywhere: Mapping[str, float]) -> dict[str, Any]:
    """``{tokens: [{text, share}], grain, what, share, expected}`` of a side's mass by token text.

    ``everywhere``: how often every token text occurs. Grain is ``silent`` where there is no mass.
    """
    total, occurrences = sum(mass.values()), max(sum(everywhere.values()), 1e-30)
    if total <= 0:
        return {"tokens": [], "grain": "silent", "what": None, "share": 0.0, "expected": 0.0}
    ranked = sorted(mass.items(), key=lambda item: (-item[1], item[0]))
    tokens = [{"text": text, "share": value / total} for text, value in ranked[:_SHOWN]]
    found = {"grain": "broad", "what": None, "share": 1.0, "expected": 1.0}
    for grain, what, holds in _candidates(ranked):
        share = sum(value for text, value in mass.items() if holds(text)) / total
        expected = sum(value for text, value in everywhere.items() if holds(text)) / occurrences
        if share >= _SHARE and share >= _LIFT * expected:
            found = {"grain": grain, "what": what, "share": share, "expected": expected}
            break
    return {"tokens": tokens, **found}


def _candidates(ranked: list[tuple[str, float]]) -> Iterable[tuple[str, str, Callable[[str], bool]]]:
    top = ranked[0][0]
    yield "token", top, lambda text: text == top
    yield "word", _word(top), lambda text: _word(text) == _word(top) != ""
    for piece in _pieces(ranked):
        yield "substring", piece, lambda text, piece=piece: piece in _word(text)
    for name, holds in _CAPITALS.items():
        yield "capitalisation", name, holds
    for name, holds in _CLASSES.items():
        yield "word class", name, holds


def _word(text: str) -> str:
    return text.strip().casefold()


def _pieces(ranked: list[tuple[str, float]]) -> list[str]:
    """Runs of letters that hold at least 60% of the mass, longest first."""
    held = defaultdict[str, float](float)
    for text, value in ranked:
        word = _word(text)
        runs = {word[i:j] for i in range(len(word)) for j in range(i + 2, min(len(word), i + 8) + 1)}
        for run in runs:
            if run.isalpha():
                held[run] += value
    least = _SHARE * sum(value for _, value in ranked)
    return sorted((run for run, value in held.items() if value >= least), key=lambda run: (-len(run), -held[run], run))[
        :4
    ]


def same_grain(first: str, second: str) -> str:
    """How two tokens are alike: ``token``, ``word``, ``substring`` (of three letters), ``word class`` or ``none``."""
    if first == second:
        return "token"
    one, other = _word(first), _word(second)
    if one and one == other:
        return "word"
    if any(one[i : i + 3].isalpha() and one[i : i + 3] in other for i in range(len(one) - 2)):
        return "substring"
    alike = [name for name, holds in _CLASSES.items() if holds(first) and holds(second)]
    return "word class" if alike else "none"
