"""Skip-trigram heads of an attention replacement layer: [query token ... key token -> token], found and checked.

Shape legend: B contexts, T positions, n heads looked at, D = d_model, V tokens of the vocabulary.

1. QK and OV circuits, read by data: on training contexts a head moves A(t,s) v(s) W_O from s to t, s < t and not the
   first token, where it is among the heads that write. The lengths of its largest moves, summed by the tokens at t and
   s, make a table; a skip-trigram head's moves gather on few pairs. Frequent tokens would fill every head's table, so a
   pair counts by its excess over what the margins give, sum(q,k) - sum(q,.) sum(.,k) / sum(.,.). Of the pairs in excess
   that occur in two training contexts and in held-out ones, those of all heads are taken from the largest excess down,
   every head and every pair once.
2. The token that the pair promotes: what the head moves to t from the keys of the pair's token, all of them before t,
   is taken out of the base model's attention output at the pair's strongest training moves; the token whose logit falls
   most, against the mean over the vocabulary, is it.
3. Check on held-out contexts, at places that are named by the two tokens alone: the same removal, the same token.
   Controls: removing what the next head of the list moves there from the same keys (permuted heads); the fall of the
   next triple's token (permuted tokens); at the places of up to 9 other triples, removing what the same head moves from
   those triples' keys (permuted pairs). A triple is confirmed where its logit falls by more than in all of them and the
   head attends to the key's token more than if all earlier keys were alike. The token was chosen as this head's own, so
   a head that promotes it everywhere beats the first two: chance counts places only, one in as many as were compared.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.splice import Prefix, run_with_prefix, splice
from crosshead.attention import wide
from crosshead.attention.replacement import Module
from crosshead.dictionaries.base import Batch

__all__ = ["Reader", "find_skip_trigrams"]

Reader = Callable[[Sequence[int]], Batch]
"""Reads contexts of one split, by number, at the sites that the module reads."""

_OTHER_PAIRS = 9
"""Other triples at whose places a head is looked at."""
_STRONGEST = 512
"""Moves of a head that are kept of every batch."""
_PRESELECTED = 8
"""Heads whose moves are looked at, for every one that is listed: those that write most."""


class _Place(NamedTuple):
    context: int
    position: int


class _Triple(NamedTuple):
    head: int
    query: int
    key: int
    share: float
    """Of the lengths of the head's recorded moves."""
    lift: float
    """Over what the margins give."""
    n_contexts: int
    train: list[_Place]
    heldout: list[_Place]


@torch.no_grad()
def find_skip_trigrams(
    module: Module,
    model: LanguageModel,
    train: tuple[Reader, int],
    heldout: tuple[Reader, int],
    *,
    heads: int,
    events: int,
    contexts_per_batch: int = 4,
) -> dict[str, Any]:
    """Look for the triples of the ``heads`` heads with the largest pairs; ``events`` places each, on either split.

    ``train`` and ``heldout``: how to read contexts, and how many to look at.
    """
    reader, n_contexts = heldout
    tokens = torch.cat([reader([context]).tokens.cpu() for context in range(n_contexts)])
    triples = _triples(module, train, tokens, heads, events, contexts_per_batch)
    promoted: list[tuple[int, float]] = []
    for triple in triples:
        falls = [_fall(module, model, train[0], place, [triple.head], triple.key)[0] for place in triple.train]
        fall = torch.stack(falls).mean(0)
        promoted.append((int(fall.argmax()), float(fall.max())))
    rows = [_row(module, model, heldout[0], found) for found in _checked(module, model, heldout[0], triples, promoted)]
    chance = 1 / (1 + min((row["n_other_pairs"] for row in rows), default=0))
    return {"n_heads": len(rows), "n_confirmed": sum(row["confirmed"] for row in rows), "chance": chance,
            "triples": rows}  # fmt: skip


class _Checked(NamedTuple):
    """A triple with the token that it promotes, and by how much logits fall on held-out contexts."""

    triple: _Triple
    token: int
    train: float
    """Of the token, at the places where it was chosen."""
    own: float
    controls: dict[str, float | None]
    """None where the list has no other head, token or pair; of pairs the largest fall."""
    n_other_pairs: int


def _checked(
    module: Module, model: LanguageModel, reader: Reader, triples: Sequence[_Triple],
    promoted: Sequence[tuple[int, float]],
) -> list[_Checked]:  # fmt: skip
    tokens = [token for token, _ in promoted]
    other_head = [_next_different([t.head for t in triples], i) for i in range(len(triples))]
    other_token = [_next_different(tokens, i) for i in range(len(triples))]
    other_pairs = [_others([(t.query, t.key) for t in triples], i, _OTHER_PAIRS) for i in range(len(triples))]
    # Every place is run once, with all removals that are asked for there; all are of keys of that place's own triple.
    removed = [{triple.head} for triple in triples]
    for i, (head, pairs) in enumerate(zip(other_head, other_pairs, strict=True)):
        if head is not None:
            removed[i].add(triples[head].head)
        for pair in pairs:
            removed[pair].add(triples[i].head)
    falls = []
    for triple, heads in zip(triples, removed, strict=True):
        listed = sorted(heads)
        places = [torch.stack(_fall(module, model, reader, place, listed, triple.key)) for place in triple.heldout]
        falls.append(dict(zip(listed, torch.stack(places).mean(0), strict=True)))
    found = []
    for i, triple in enumerate(triples):
        head, token, pairs = other_head[i], other_token[i], other_pairs[i]
        controls = {
            "head": None if head is None else float(falls[i][triples[head].head][tokens[i]]),
            "token": None if token is None else float(falls[i][triple.head][tokens[token]]),
            "pair": max((float(falls[pair][triple.head][tokens[i]]) for pair in pairs), default=None),
        }
        found.append(_Checked(triple, tokens[i], promoted[i][1], float(falls[i][triple.head][tokens[i]]), controls,
                              len(pairs)))  # fmt: skip
    return found


def _row(module: Module, model: LanguageModel, reader: Reader, found: _Checked) -> dict[str, Any]:
    triple, controls = found.triple, found.controls
    against = [value for value in controls.values() if value is not None]
    attention, elsewhere = _attention(module, reader, triple)
    figures = {
        "share": triple.share, "lift": triple.lift, "fall_train": found.train, "fall": found.own,
        **{f"fall_other_{name}": value for name, value in controls.items()},
        "attention": attention, "attention_elsewhere": elsewhere,
    }  # fmt: skip
    return {
        "head": triple.head, "query": _text(model, triple.query), "key": _text(model, triple.key),
        "token": _text(model, found.token), "n_train_contexts": triple.n_contexts,
        "n_train_events": len(triple.train), "n_events": len(triple.heldout),
        "n_other_pairs": found.n_other_pairs,
        **{name: None if value is None else round(value, 6) for name, value in figures.items()},
        "confirmed": len(against) == len(controls) and found.own > max(0.0, *against) and attention > elsewhere,
    }  # fmt: skip


# ---- finding pairs ----


def _triples(
    module: Module, train: tuple[Reader, int], heldout: Int[Tensor, "n T"], heads: int, events: int,
    contexts_per_batch: int,
) -> list[_Triple]:  # fmt: skip
    reader, n_contexts = train
    groups = [list(range(i, min(i + contexts_per_batch, n_contexts))) for i in range(0, n_contexts, contexts_per_batch)]
    energy: Tensor | float = 0.0
    for group in groups:
        batch = reader(group)
        energy = energy + module.sizes(module.encode(batch))[batch.mask.flatten()].double().square().sum(0)
    assert isinstance(energy, Tensor)
    chosen = energy.topk(min(_PRESELECTED * heads, len(energy))).indices.sort().values
    chosen = chosen[energy[chosen] > 0]
    sums: list[dict[tuple[int, int], float]] = [defaultdict(float) for _ in chosen]
    seen: list[dict[tuple[int, int], list[tuple[float, _Place]]]] = [defaultdict(list) for _ in chosen]
    for group in groups:
        for i, moves in enumerate(_strongest_moves(module, reader(group), chosen)):
            for size, context, t, query, key in moves:
                sums[i][query, key] += size
                seen[i][query, key].append((size, _Place(group[context], t)))
    excesses = [_excesses(own) for own in sums]
    ranked = [(excess, i, pair) for i, own in enumerate(excesses) for pair, (excess, _) in own.items() if excess > 0]
    found: list[_Triple] = []
    for _, i, pair in sorted(ranked, key=lambda item: (-item[0], *item[1:])):
        head, moves = int(chosen[i]), seen[i][pair]
        if any(triple.head == head or (triple.query, triple.key) == pair for triple in found):
            continue
        n_found_in = len({place.context for _, place in moves})
        if n_found_in >= 2 and (there := _spread_out(_places_of(pair, heldout), events)):
            strongest = [place for _, place in sorted(moves, key=lambda move: (-move[0], move[1]))]
            share, lift = sums[i][pair] / sum(sums[i].values()), excesses[i][pair][1]
            found.append(_Triple(head, *pair, share, lift, n_found_in, _spread_out(strongest, events), there))
            if len(found) == heads:
                break
    return found


def _excesses(sums: dict[tuple[int, int], float]) -> dict[tuple[int, int], tuple[float, float]]:
    """By how much every pair's sum exceeds what the margins of its two tokens give, as difference and as ratio."""
    by_query, by_key = defaultdict[int, float](float), defaultdict[int, float](float)
    for (query, key), size in sums.items():
        by_query[query] += size
        by_key[key] += size
    total = sum(by_query.values())
    expected = {pair: by_query[pair[0]] * by_key[pair[1]] / total for pair in sums}
    return {pair: (size - expected[pair], size / expected[pair]) for pair, size in sums.items()}


def _strongest_moves(module: Module, batch: Batch, chosen: Tensor) -> list[list[tuple[float, int, int, int, int]]]:
    """Per head its largest moves: (size, context in the batch, t, token at t, token at s)."""
    n_positions = batch.mask.shape[1]
    earlier = torch.ones(n_positions, n_positions, dtype=torch.bool, device=batch.mask.device).tril(-1)
    counted = earlier & batch.mask[:, :, None] & batch.mask[:, None, :]
    found = []
    for moves in _moves(module, batch, chosen.tolist()):
        sizes = moves.pattern * moves.written.norm(dim=-1)[:, None, :] * counted
        top = sizes.flatten().topk(min(_STRONGEST, sizes.numel()))
        rows = []
        for size, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            if size > 0:
                context, rest = divmod(place, n_positions**2)
                t, s = divmod(rest, n_positions)
                rows.append((size, context, t, int(batch.tokens[context, t]), int(batch.tokens[context, s])))
        found.append(rows)
    return found


def _places_of(pair: tuple[int, int], tokens: Int[Tensor, "n T"]) -> list[_Place]:
    """Where a pair occurs: the query's token, the key's somewhere before it, neither at the first position."""
    query, key = (tokens == token for token in pair)
    query[:, 0] = key[:, 0] = False
    before = (key.long().cumsum(1) - key.long()) > 0
    return [_Place(context, t) for context, t in torch.nonzero(query & before).tolist()]


def _spread_out(places: Sequence[_Place], count: int) -> list[_Place]:
    """The first ``count`` places, contexts that are not yet among them first."""
    fresh, again, contexts = [], [], set()
    for place in dict.fromkeys(places):
        (again if place.context in contexts else fresh).append(place)
        contexts.add(place.context)
    return (fresh + again)[:count]


# ---- what heads move ----


class _Moves(NamedTuple):
    """What one head moves from s to t is ``pattern[:, t, s] written[:, s]``; the sum over s is what it writes at t."""

    pattern: Float[Tensor, "B T T"]
    """A(t,s); zero at every t where the head is not among those that write."""
    written: Float[Tensor, "B T D"]
    """v(s) W_O, gated, in normalised units."""

    def from_keys(self, keys: Bool[Tensor, "B T"]) -> Float[Tensor, "B D"]:
        """What arrives at the last position from some keys."""
        return ((self.pattern[:, -1] * keys)[:, None] @ self.written)[:, 0]


def _moves(module: Module, batch: Batch, heads: Sequence[int]) -> Iterator[_Moves]:
    """Of some heads, one at a time; heads of a group share its pattern."""
    q, k = module.queries_keys(batch)
    v = module.values(batch)[0]
    allowed, features = wide.allowed_keys(batch.mask), module.config.features
    per_group, columns = features // module.config.groups, len(module.out) // features
    writes = (module.encode(batch).view(*batch.mask.shape, features, columns) != 0).any(-1)
    for head in heads:
        g, first = head // per_group, (head % per_group) * columns
        pattern = wide.patterns(q[:, g : g + 1], k[:, g : g + 1], allowed, module.scale)[:, 0]
        out = module.out[head * columns : (head + 1) * columns]
        if module.config.gates is not None:
            out = module.gate[head] * out
        yield _Moves(pattern * writes[:, :, head, None], v[:, g, :, first : first + columns] @ out)


def _earlier_keys(batch: Batch) -> Bool[Tensor, "B T"]:
    """Counted keys before the last position."""
    keys = batch.mask.clone()
    keys[:, 0] = keys[:, -1] = False
    return keys


# ---- interventions ----


def _fall(
    module: Module, model: LanguageModel, reader: Reader, place: _Place, heads: Sequence[int], key: int
) -> list[Float[Tensor, " V"]]:
    """By how much every logit falls when what a head moves to a place from a token's earlier keys is taken away.

    Less the mean over tokens; one for every head.
    """
    batch = _until(reader([place.context]), place.position)
    clean, prefix = run_with_prefix(model, batch.tokens, module.layer)
    keys = _earlier_keys(batch) & (batch.tokens == key)
    return [_removed(module, model, batch, prefix, clean[0, -1].float(), moves.from_keys(keys)[0])
            for moves in _moves(module, batch, heads)]  # fmt: skip


def _removed(
    module: Module, model: LanguageModel, batch: Batch, prefix: Prefix, clean: Tensor, moved: Float[Tensor, " D"]
) -> Float[Tensor, " V"]:
    site = module.target_sites[0]
    changed = batch[site].clone()
    changed[0, -1] -= moved / module.target_scale
    where = torch.zeros_like(batch.mask)
    where[0, -1] = True
    logits = splice(model, batch.tokens, {site: changed}, where, prefix=prefix)
    fall = (clean - logits[0, -1].float()).cpu()
    return fall - fall.mean()


def _until(batch: Batch, position: int) -> Batch:
    """The context up to a position: later ones have no influence on it."""
    sites = {site: tensor[:, : position + 1] for site, tensor in batch.sites.items()}
    return Batch(sites, batch.mask[:, : position + 1], batch.tokens[:, : position + 1])


def _attention(module: Module, reader: Reader, triple: _Triple) -> tuple[float, float]:
    """Mean attention, at the held-out places, on earlier keys of the triple's token together, and elsewhere.

    The second is what keys of as many occurrences would get if all earlier ones but the first token were alike.
    """
    per_group = module.config.features // module.config.groups
    on_pair, elsewhere = 0.0, 0.0
    group = slice(triple.head // per_group, triple.head // per_group + 1)
    for place in triple.heldout:
        batch = _until(reader([place.context]), place.position)
        row, keys = module.patterns(batch, group)[0, 0, -1], _earlier_keys(batch)[0]
        same = keys & (batch.tokens[0] == triple.key)
        on_pair += float(row[same].sum())
        elsewhere += float(row[keys].mean() * same.sum())
    return on_pair / len(triple.heldout), elsewhere / len(triple.heldout)


def _next_different(values: Sequence[Any], i: int) -> int | None:
    """The next number, around the end, whose value is another than that of ``i``; None where all are equal."""
    turned = [*range(i + 1, len(values)), *range(i)]
    return next((j for j in turned if values[j] != values[i]), None)


def _others(values: Sequence[Any], i: int, count: int) -> list[int]:
    """The next numbers, around the end, whose values differ from that of ``i`` and from one another."""
    found: dict[Any, int] = {}
    for j in (*range(i + 1, len(values)), *range(i)):
        if values[j] != values[i]:
            found.setdefault(values[j], j)
    return list(found.values())[:count]


def _text(model: LanguageModel, token: int) -> str:
    return str(model.tokenizer.decode([token]))
