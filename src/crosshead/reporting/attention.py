"""The report's sections on QK features and attention replacement layers, as Markdown. Computes nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from crosshead.reporting.tables import Column, Record, markdown_table, quoted

__all__ = ["attention_sections"]

_FEATURES = (
    Column("run", "run"), Column("heads", "heads"), Column("rank", "rank"), Column("position", "position"),
    Column("features", "features", "{:,}"), Column("sparsity", "chosen_by"), Column("pair L0", "l0", "{:.2f}"),
    Column("query side", "l0_query", "{:.1f}"), Column("key side", "l0_key", "{:.1f}"),
    Column("scores: normalised MSE", "normalised_mse", "{:.4f}"), Column("with first key", "with_first", "{:.4f}"),
    Column("patterns", "pattern", "{:.3f}"), Column("with first key", "pattern_with_first", "{:.3f}"),
    Column("KL (nats)", "kl", "{:.3f}"), Column("with first key", "kl_with_first", "{:.3f}"),
    Column("same top key", "top1", "{:.1%}"), Column("with first key", "top1_with_first", "{:.1%}"),
    Column("CE recovered", "ce_recovered", "{:.3f}"), Column("delta CE", "delta_ce", "{:.4f}"),
    Column("patched tokens", "n_patched", "{:,}"), Column("dead", "dead_fraction", "{:.1%}"), Column("seed", "seed"),
    Column("tokens trained", "tokens_trained", "{:,}"), Column("held-out tokens", "n_tokens", "{:,}"),
)  # fmt: skip
_REFERENCES = (
    Column("heads", "heads"), Column("reference", "name"), Column("pair L0", "l0", "{:.0f}"),
    Column("scores: normalised MSE", "normalised_mse", "{:.4f}"), Column("KL (nats)", "kl", "{:.3f}"),
)  # fmt: skip
_PLANTED = (
    Column("planted layer", "position"), Column("planted features", "features"), Column("seed", "seed"),
    Column("recovered", "share_recovered", "{:.1%}"), Column("correlation", "correlation", "{:.3f}"),
    Column("scores: normalised MSE", "normalised_mse", "{:.4f}"), Column("pair L0", "l0", "{:.2f}"),
    Column("planted pair L0", "l0_true", "{:.2f}"),
)  # fmt: skip
_INDUCTION = (
    Column("run", "run"), Column("feature", "feature"), Column("score", "score", "{:.2f}"),
    Column("share on text", "share_text", "{:.1%}"), Column("expected", "expected_text", "{:.1%}"),
    Column("largest of permuted pairs", "permuted_largest", "{:.1%}"), Column("p", "p_value", "{:.3f}"),
    Column("query side", "query_text"), Column("before the key", "before_text"), Column("key side", "key_text"),
    Column("same token", "alike_token", "{:.0%}"), Column("else same word", "alike_word", "{:.0%}"),
    Column("else three letters", "alike_substring", "{:.0%}"), Column("else same class", "alike_word class", "{:.0%}"),
    Column("not alike", "alike_none", "{:.0%}"), Column("an example: key", "example_key"),
    Column("its query", "example_query"),
)  # fmt: skip
_PAIRS = (
    Column("feature", "feature"), Column("adds", "contribution", "{:+.3f}"),
    Column("query activation", "query_activation", "{:.2f}"), Column("key activation", "key_activation", "{:.2f}"),
    Column("", "how"), Column("deleted below", "deleted"),
)  # fmt: skip
_KEYS = (
    Column("position", "position"), Column("key", "text"), Column("attention", "attention", "{:.1%}"),
    Column("by the features", "predicted", "{:.1%}"), Column("after the deletion", "attention_after", "{:.1%}"),
    Column("after it, predicted from features alone", "predicted_after", "{:.1%}"),
)  # fmt: skip
_DELETION = (
    Column("deletion of the pairs, predicted", "how"), Column("attention on the key falls by", "model_fall", "{:.1%}"),
    Column("predicted fall", "fall", "{:.1%}"), Column("distance of the patterns after it", "distance", "{:.2g}"),
    Column("before it", "distance_before", "{:.2g}"), Column("of the model's own two", "model_distance", "{:.2g}"),
)  # fmt: skip
_LAYERS = (
    Column("run", "run"), Column("variant", "variant"), Column("heads or features", "features", "{:,}"),
    Column("width", "head_dim"), Column("start", "start"), Column("penalties", "penalties"),
    Column("parameters", "parameters", "{:,}"),
    Column("normalised MSE", "normalised_mse", "{:.4f}"), Column("refitted", "normalised_mse_refit", "{:.4f}"),
    Column("CE recovered (mean)", "ce_recovered", "{:.3f}"), Column("(zero)", "ce_recovered_zero", "{:.3f}"),
    Column("active per position", "l0", "{:.1f}"), Column("alive", "heads_alive", "{:,}"),
    Column("rank of QK", "rank_qk", "{:.1f}"), Column("rank of OV", "rank_ov", "{:.1f}"),
    Column("pattern entropy (nats)", "pattern_entropy", "{:.2f}"), Column("on first token", "first_token", "{:.1%}"),
    Column("steps", "steps"), Column("seed", "seed"), Column("held-out tokens", "n_tokens", "{:,}"),
)  # fmt: skip
_TRIGRAMS = (
    Column("run", "run"), Column("head", "head"), Column("key token", "key_text"), Column("query token", "query_text"),
    Column("promotes", "token_text"), Column("fall of its logit", "fall", "{:.3f}"),
    Column("other head", "fall_other_head", "{:.3f}"), Column("other token", "fall_other_token", "{:.3f}"),
    Column("other places", "fall_other_pair", "{:.3f}"), Column("attention", "attention", "{:.1%}"),
    Column("elsewhere", "attention_elsewhere", "{:.1%}"), Column("lift", "lift", "{:.1f}"),
    Column("confirmed", "confirmed"),
)  # fmt: skip
_INDUCTION_HEADS = (
    Column("run", "run"), Column("live", "n_live", "{:,}"), Column("induction heads", "n_found"),
    Column("tokens in another order", "n_found_by_control"), Column("best score", "best_score", "{:.3f}"),
    Column("median", "median_score", "{:.3f}"), Column("base layer's best", "base_best", "{:.3f}"),
    Column("loss", "clean", "{:.3f}"), Column("without them", "without_found", "{:.3f}"),
    Column("without as many others", "without_others", "{:.3f}"), Column("tokens", "n_tokens", "{:,}"),
)  # fmt: skip
_LENGTHS = (
    Column("run", "run"), Column("architecture", "architecture"), Column("features or heads", "features", "{:,}"),
    Column("normalised MSE", "normalised_mse", "{:.4f}"), Column("as sent", "normalised_mse_sent", "{:.4f}"),
    Column("bits", "bits", "{:,.0f}"), Column("activations", "bits_activations", "{:,.0f}"),
    Column("of these which", "bits_which", "{:,.0f}"), Column("units exchanged", "bits_shuffled", "{:,.0f}"),
    Column("positions", "bits_positions", "{:,.0f}"), Column("keys reordered", "bits_positions_shuffled", "{:,.0f}"),
    Column("units sent", "units_active", "{:.1f}"), Column("keys named", "keys_named", "{:.1f}"),
    Column("precision reached", "precision_reached"), Column("tokens", "n_tokens", "{:,}"),
)  # fmt: skip


def attention_sections(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Tables for the template by name; empty where nothing was measured."""
    features, layers = ([r for r in metrics["attention"] if r["architecture"] == kind]
                        for kind in ("qk_diagonal", "replacement"))  # fmt: skip
    explain = metrics["explain"] or {"induction": [], "decisions": [], "planted": []}
    found = metrics["replacements"] or {"heads": [], "description_lengths": []}
    trigrams = [_trigram_row(row["run"], triple) for row in found["heads"]
                for triple in row["skip_trigrams"]["triples"]]  # fmt: skip
    induction = [_induction_row(row["run"], feature) for row in explain["induction"] for feature in row["features"]]
    counts = [{name: row[name] for name in ("run", "n_live", "n_induction")} for row in explain["induction"]]
    return {
        "features": _table(_FEATURES, [_feature_row(r) for r in features]),
        "references": _table(_REFERENCES, _reference_rows(features)),
        "planted": _table(_PLANTED, explain["planted"]),
        "induction_counts": counts,
        "induction": _table(_INDUCTION, induction),
        "decisions": [_decision(decision) for decision in explain["decisions"]],
        "layers": _table(_LAYERS, [_layer_row(r) for r in layers]),
        "trigrams": _table(_TRIGRAMS, trigrams),
        "induction_heads": _table(_INDUCTION_HEADS, [_induction_heads_row(row) for row in found["heads"]]),
        "lengths": _table(_LENGTHS, found["description_lengths"]),
    }


def _table(columns: Sequence[Column], rows: Sequence[Record]) -> str:
    return markdown_table(columns, rows) if rows else ""


def _heads(record: Record) -> str:
    heads = record["config"]["heads"]
    return "all" if heads == "all" else ", ".join(map(str, heads))


def _feature_row(record: Record) -> Record:
    measured, config = record["evaluation"], record["config"]
    patching = measured["patching"] or {}
    names = {"pattern": "normalised_mse_pattern", "kl": "kl", "top1": "top1_agreement"}
    with_first = {f"{name}_with_first": measured["keys_with_first"][key] for name, key in names.items()}
    return record | {name: measured["keys"][key] for name, key in names.items()} | with_first | {
        "heads": _heads(record), "chosen_by": _sparsity(config.get("sparsity") or {}), "rank": config["rank"],
        "position": config["position"], "l0_query": measured["l0_query"], "l0_key": measured["l0_key"],
        "with_first": measured["keys_with_first"]["normalised_mse"], "delta_ce": patching.get("delta_ce"),
        "n_patched": patching.get("n_tokens"),
    }  # fmt: skip


def _sparsity(sparsity: Record) -> str:
    """Its kind and what a sweep varies of it."""
    kind = str(sparsity.get("kind", "")).replace("_", " ")
    if kind == "jumprelu":
        return f"{kind} {sparsity['coefficient']:g}, from L0 {sparsity['start_l0']:g}"
    return f"{kind} {sparsity.get('k', sparsity.get('coefficient', ''))}".strip()


def _penalties(config: Record) -> str:
    """Penalties of a replacement layer that are on, with their coefficients."""
    named = {"QK": config.get("lambda_qk"), "OV": config.get("lambda_ov"),
             "gates": (config.get("gates") or {}).get("coefficient"),
             "patterns": (config.get("pattern") or {}).get("coefficient")}  # fmt: skip
    return ", ".join(f"{name} {value:g}" for name, value in named.items() if value)


def _reference_rows(records: Sequence[Record]) -> list[Record]:
    """The references of every choice of heads, once: runs of the same heads share them."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(_heads(record), record)
    return [{"heads": heads} | reference for heads, record in first.items()
            for reference in record["evaluation"]["references"]]  # fmt: skip


def _induction_row(run: str, feature: Record) -> Record:
    examples = feature["examples"]
    row = {"run": run, **feature, **{f"alike_{name}": share for name, share in feature["alike"].items()}}
    for side, name in (("query", "query"), ("before_key", "before"), ("key", "key")):
        row[f"{name}_text"] = _side(feature[side])
    if examples:
        row |= {f"example_{side}": quoted(examples[0][side]) for side in ("key", "query")}
    return row


def _side(side: Record) -> str:
    """The grain, what it is, and the strongest tokens."""
    if side["grain"] == "silent":
        return "silent"
    what = "" if side["what"] is None else f" {quoted(side['what'])}"
    tokens = " ".join(quoted(token["text"]) for token in side["tokens"][:3])
    return f"{side['grain']}{what} ({side['share']:.0%}): {tokens}"


def _decision(decision: Record) -> Record:
    deleted = set(decision["deleted"])
    pairs = [pair | {"deleted": "yes" if pair["feature"] in deleted else "",
                     "how": "by centring" if pair["by_centring"] else ""} for pair in decision["pairs"]]  # fmt: skip
    keys = [key | {"text": quoted(key["token"])} for key in decision["strongest_keys"]]
    texts = {name: quoted(decision[name]) for name in ("text", "query_token", "key_token", "next_token")}
    tables = [markdown_table(_KEYS, keys)]
    if alone := decision.get("predicted_from_features_alone"):
        tables.append(markdown_table(_DELETION, _deletion_rows(decision, alone)))
    return decision | texts | {"pairs": markdown_table(_PAIRS, pairs), "keys_table": "\n\n".join(tables),
                               "n_deleted": len(deleted)}  # fmt: skip


def _deletion_rows(decision: Record, alone: Record) -> list[Record]:
    """The prediction that tests the features, then the one that tests the intervention alone."""
    same = {"fall": decision["attention"] - decision["attention_after_predicted"], "model_fall": alone["model_fall"]}
    return [alone | {"how": "from features alone"}, same | {"how": "by the same arithmetic on the model's own scores"}]


def _layer_row(record: Record) -> Record:
    measured, config = record["evaluation"], record["config"]
    spreads = {name: measured[name]["median"] for name in ("rank_qk", "rank_ov", "pattern_entropy", "first_token")}
    if config["variant"]["kind"] == "combined":
        spreads["rank_qk"] = None  # qk_active of the parameters, nothing that was measured
    return record | spreads | {"variant": config["variant"]["kind"].replace("_", " "), "head_dim": config["head_dim"],
                              "start": str(config.get("start", "random")).replace("_", " "),
                              "penalties": _penalties(config),
                              "normalised_mse_refit": measured["normalised_mse_refit"],
                              "heads_alive": measured["heads_alive"]}  # fmt: skip


def _trigram_row(run: str, triple: Record) -> Record:
    return {"run": run, **triple, **{f"{name}_text": quoted(triple[name]) for name in ("key", "query", "token")}}


def _induction_heads_row(row: Record) -> Record:
    induction = row["induction"]
    return {"run": row["run"], **induction, "base_best": max(induction["base_scores"]), **(induction["removal"] or {})}
