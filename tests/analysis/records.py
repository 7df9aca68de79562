"""Made-up documents of every stage, for findings and reports."""

from typing import Any

import numpy as np

from crosshead.analysis.frontiers import null_record

NOISE = np.random.default_rng(0).uniform(0.8, 1.2, 12)


def record(series: str, l0: float, mse: float, seed: int = 0, **other: Any) -> dict[str, Any]:
    errors, variance = (mse * 10 * NOISE).tolist(), [10.0] * len(NOISE)
    mse = sum(errors) / sum(variance)
    moved = other.get("architecture", "mtc") == "mtc"
    spread = {
        "participation_ratio_median": 1.2,
        "participation_ratio_mean": 1.4,
        "identity_share": 0.1,
        "n_features": 90,
    }
    return {
        "run": f"{series}-{l0:g}" + (f"-s{seed}" if seed else ""), "series": series, "family": "test",
        "architecture": "mtc", "layers": [17], "target": "attn_out", "features": 128, "heads_per_feature": "all",
        "sparsity": {"kind": "topk", "k": int(l0)}, "sparsity_value": l0, "seed": seed, "control": "none",
        "control_detail": None, "start": "value_maps", "learning_rate": 4e-3, "steps": 10,
        "tokens_trained": 1000, "parameters": 5, "l0": l0, "normalised_mse": mse, "ce_recovered": 0.8,
        "ce_recovered_zero": 0.9, "dead_fraction": 0.02, "n_tokens": 3000,
        "evaluation": {
            "normalised_mse": mse, "normalised_mse_refit": mse, "shrinkage": 1.0, "context_squared_error": errors,
            "context_variance": variance, "l1": 1.0,
            "l0_query": 5.0 if moved else None, "l0_triples": 7.0 if moved else None,
            "superposition": spread if moved else None,
            "pruned": [{"movers": m, "normalised_mse": mse * (1 + 0.2 / m), "n_tokens": 900} for m in (1, 2, 10)]
            if moved else [],
            "n_tokens_detail": 900 if moved else 0, "density_histogram": [1, 2], "density_edges": [-2.0, -1.0, 0.0],
        },
        "splicing": {"kl": 0.1, "delta_ce": 0.05, "n_tokens": 700},
    } | other  # fmt: skip


def _of_two_layers(row: dict[str, Any]) -> dict[str, Any]:
    """Twice the squares, and twice the weighted norm of codes."""
    doubled = {key: [2 * x for x in row["evaluation"][key]] for key in ("context_squared_error", "context_variance")}
    return row | {"evaluation": row["evaluation"] | doubled | {"l1": 2.0}}


def documents(seeds=(0,), top1_factor: float = 1.1, both_factor: float = 0.9, p_value: float = 0.5) -> dict[str, Any]:
    """Arguments of ``collect``."""
    rows = []
    value = {"architecture": "value_sae", "target": "v", "heads_per_feature": None,
             "sparsity": {"kind": "l1", "coefficient": 1.0}}  # fmt: skip
    for seed in seeds:
        for l0 in (30, 60, 110, 200):
            rows.append(record("mtc", l0, 5 / l0, seed))
            rows.append(record("top1", l0, top1_factor * 5 / l0, seed, heads_per_feature=1))
            for series in ("value-first", "value-second"):
                rows.append(record(series, l0, 4 / l0, seed, **value))
            for series, factor in (("value-both", both_factor), ("value-both-equal", both_factor),
                                   ("value-both-control", 1.0)):  # fmt: skip
                rows.append(_of_two_layers(record(series, 2 * l0, factor * 4 / l0, seed, **value, layers=[17, 23])))
            rows.append(record("attn-out-sae", l0, 3 / l0, seed, **(value | {"architecture": "attn_out_sae"})))
    rows.append(record("heads2", 60, 0.09, heads_per_feature=2))
    rows.append(record("mtc-resid", 60, 0.2, target="resid_out"))
    fit = {"alpha": 2.1, "x_min": 3, "ks": 0.05, "n_tail": 40, "n_clusters": 64, "p_value": p_value,
           "likelihood_ratios": {"lognormal": {"ratio": 0.1, "p_value": 0.8}}}  # fmt: skip
    sources = ("mtc-30", "mtc-30/shuffled")
    return {
        "records": rows,
        "provenance": {"id": "m==1", "source": "pypi", "note": "4-bit weights.", "quantisation": "Q4_1"},
        "corpus": {"context_length": 64, "n_contexts": {"train": 32, "heldout": 8}, "fingerprint": "f",
                   "sources": [{"domain": "prose"}, {"domain": "code"}]},
        "layers_chosen_by": "survey",
        "layers": {"first": 17, "second": 23, "adjacent": 18},
        "survey": [{"layer": layer, "head": head, "induction": 0.1 * head, "previous_token": 0.1,
                    "duplicate_token": 0.0, "first_token": 0.4} for layer in range(3) for head in range(4)],
        "references": {"layer": 17, "target": "attn_out", "n_tokens": 3000, "bos_only": 0.9,
                       "own_position_linear": 0.5, "linear_top1": [{"rank": 60, "l0": 60, "normalised_mse": 0.4}],
                       "svd": [{"rank": 60, "normalised_mse": 0.2}]},
        "clusters": {"clusters": [{"source": s, "k": 64, "seed": 0} | fit for s in sources],
                     "sizes": [{"source": s, "k": 64, "seed": 0, "sizes": [9, 5, 2, 1, 0]} for s in sources],
                     "agreement": [{"source": "mtc-30", "k": 64, "adjusted_rand": 0.5}],
                     "n_features": {"mtc-30": 120}, "bootstraps": 100, "hdbscan": [
                         {"source": "mtc-30", "n_clusters": 3, "unassigned": 0.4, "k": 4, "adjusted_rand": 0.5},
                         {"source": "mtc-30/sphere", "n_clusters": 0, "unassigned": 1.0, "k": None,
                          "adjusted_rand": None},
                     ]},
        "audit": {"tolerance": 1e-4, "runs": [{"run": "mtc-30", "architecture": "mtc", "normalised_mse": 0.16,
                                               "recomputed": 0.16, "difference": 2e-8, "agrees": True,
                                               "heads_per_feature": "all", "target": "attn_out", "sparsity": "topk",
                                               "reason": None}]},
    }  # fmt: skip


def evidence() -> dict[str, Any]:
    """What the stages nulls, planted and meaning hand to ``collect``."""
    rows = [
        record(series, k, factor * 5 / k, heads_per_feature=heads) | {
            "k": k, "participation_ratio_mean": 1.1, "identity_share": 0.05
        }
        for series, factor, heads in (("mtc", 0.98, "all"), ("top1", 1.0, 1)) for k in (60, 110)
    ]  # fmt: skip
    side = {"median": 0.4, "interval": [0.3, 0.5], "shuffled": 0.02, "n_features": 50,
            "bits": {"median": 0.3, "interval": [0.2, 0.4], "shuffled": 0.0}}  # fmt: skip
    side |= {part: {"median": 0.3, "shuffled": 0.02} for part in ("top", "middle")}
    labels = {"induction": {"count": 7, "expected": 0.5, "p_value": None},
              "succession": {"count": 1, "expected": 0.2, "p_value": 0.1}}  # fmt: skip
    heads = {
        "survey_heads": [{"layer": 17, "head": 3, "score": 0.8}],
        "share_on_survey_heads": 0.8,
        "interval": [0.7, 0.9],
        "expected_share": 0.3,
    }
    read = {"n_live": 120, "labels": labels, "breadth": {"median": 4.0, "interval": [3.5, 4.5]},
            "predictability": {"from": side, "to": side}, "induction_heads": heads,
            "examples": [{"feature": 5, "label": "induction", "texts": ["a | b [c] `d`\n e"]}]}  # fmt: skip
    ratio = {"first": 4.0, "second": 5.0, "ratio": 1.2, "interval": [1.1, 1.3]}
    match = {"first": "top1-60", "second": "mtc-60", "n_live": [100, 90], "n_matched": 40, "cosine": 0.85,
             "measures": {"breadth": ratio, "tokens": None},
             "pairs": [{"features": [3, 7], "cosine": 0.9, "breadth": [4.0, 5.0], "tokens": [2.0, 2.5],
                        "texts": ["a | b", "c"]}]}  # fmt: skip
    cluster = {"run": "mtc-60", "k": 16, "cluster": 3, "size": 12}
    test = {"dip": 0.1, "p_value": 0.4, "n": 16, "power": 0.7}
    correlation = {"rho": 0.4, "p_value": 0.1, "n": 16}
    planted = [
        {"question": "recovery", "layer": "one-head", "seed": 0, "architecture": "mtc", "share_recovered": 0.98,
         "cosine_encoder": 0.99, "cosine_decoder": 0.99, "cosine_loadings": 0.99, "heads_error": 0.1, "l0": 8.0,
         "ov_dimension_error": 0.1, "adjusted_rand": 0.9, "normalised_mse": 0.01, "condition_number": 12.0},
        {"question": "superposition", "layer": "superposed", "seed": 0, "noise": 0.1, "ratio": 0.4, "null_ratio": 0.97,
         "superposed": True},
        {"question": "shared_layers", "layers": "shared", "shared": 1.0, "seed": 0, "control": "none", "ratio": 0.9,
         "found": True, "share_recovered": 0.9, "cosine_encoder": 0.57, "cosine_decoder": 0.99, "cosine_loadings": 1.0},
        {"question": "toys", "toy": "skip-trigram", "seed": 0, "accuracy": 0.99, "ratio": 0.7, "null_ratio": 0.97,
         "superposed": True, "mtc_l0": 1.0, "top1_l0": 1.0},
        *({"question": "phases", "seed": seed, "mixing": m, "noise": n, "planted_l0": 8,
           "share_recovered": 0.5 + m / 4 - n / 4 + seed / 10}
          for m in (0.0, 1.0) for n in (0.0, 0.5) for seed in (0, 1)),
    ]  # fmt: skip
    return {
        "nulls": null_record({"teacher": "top1-110", "teacher_normalised_mse": 0.1, "noise_share": 0.1}, rows),
        "planted": {"rows": planted, "seeds": [0], "commit_seed": None},
        "meaning": {
            "runs": dict.fromkeys(("mtc-60", "top1-60", "attn-out-sae-60"), read),
            "settings": {},
            "enrichment": [cluster | {"label": "induction", "n": 6, "expected": 0.7, "p_value": 1e-6, "q_value": 1e-4}],
            "enrichment_summary": {"mtc-60": {"discoveries": 4, "expected_under_shuffle": 0.3, "content_discoveries": 2,
                                              "content_expected_under_shuffle": 0.1}},
            "ov_dimensions": [cluster | {"size": size, "effective_rank": 0.6 * size, "random_low": 0.7 * size,
                                         "random_mean": 0.8 * size, "random_high": 0.9 * size} for size in (4, 12, 40)],
            "size_correlations": {"mtc-60": {"induction": correlation, "skip_trigram": correlation}},
            "modality": {"mtc-60": {"loadings": None, "ov_dimension": test}},
            "matches": [match],
        },
    }  # fmt: skip


def attention_evidence() -> dict[str, Any]:
    """Records of attention runs, and what the stages explain and replacements hand to ``collect``."""
    keys = {"normalised_mse": 0.2, "normalised_mse_pattern": 0.3, "kl": 0.4, "top1_agreement": 0.6, "per_head": []}
    references = [{"name": name, "l0": l0, "normalised_mse": mse, "kl": 1.0, "per_head": [mse]}
                  for name, l0, mse in (("mean-score", 0.0, 0.99), ("mean-query-key", 0.0, 0.7), ("svd/8", 8.0, 0.2),
                                        ("svd-content/8", 8.0, 0.2), ("coordinates/64", 64.0, 0.0))]  # fmt: skip
    spread = {"mean": 3.0, "low": 1.0, "median": 2.0, "high": 4.0}

    def run(series: str, l0: float, mse: float, kind: str, config: dict, evaluation: dict) -> dict[str, Any]:
        row = record(series, l0, mse, architecture=kind, config=config)
        del row["splicing"]
        errors = {key: row["evaluation"][key] for key in ("context_squared_error", "context_variance")}
        return row | {"evaluation": errors | {"normalised_mse": mse} | evaluation}

    features = {"l0_query": 9.0, "l0_key": 8.0, "keys": keys, "keys_with_first": keys, "references": references,
                "patching": {"n_tokens": 500, "delta_ce": 0.01}}  # fmt: skip
    layer = {"normalised_mse_refit": 0.5, "heads": 64, "heads_alive": 60, "rank_qk": spread, "rank_ov": spread,
             "pattern_entropy": spread, "first_token": spread, "head_counts": [1] * 64}  # fmt: skip
    one, every = ({"heads": heads, "rank": 1, "position": "rotary"} for heads in ([3], "all"))
    plain = {"variant": {"kind": "plain"}, "head_dim": 4}
    side = {"grain": "word", "what": "a|b", "share": 0.8, "expected": 0.1, "tokens": [{"text": " a", "share": 0.8}]}
    feature = {"feature": 7, "score": 0.6, "share_text": 0.5, "expected_text": 0.05, "permuted_largest": 0.3,
               "p_value": 0.02, "query": side, "key": side, "before_key": side | {"grain": "silent"},
               "alike": {"token": 0.9}, "examples": [{"key": "x [a] y", "query": "z [a]"}]}  # fmt: skip
    decision = {
        "run": "qk-rank1-8", "text": "Q: a\nb", "head": 3, "query": 4, "query_token": " a", "key": 2, "key_token": "\n",
        "attention": 0.4, "attention_predicted": 0.35, "score": 2.0, "predicted": 1.9, "base": 0.1, "error": 0.1,
        "pairs": [{"feature": 7, "contribution": 1.5, "query_activation": 2.0, "key_activation": 1.0,
                   "by_centring": False}], "rest": 0.3,
        "n_pairs": 5, "deleted": [7], "attention_after": 0.1, "attention_after_predicted": 0.1,
        "attention_after_others": 0.2,
        "deletion_difference": 1e-7, "next_token": " c",
        "strongest_keys": [{"position": 2, "token": "\n", "attention": 0.4, "predicted": 0.35}],
    }  # fmt: skip
    triple = {"head": 5, "query": " a", "key": " b", "token": " c", "fall": 0.5, "fall_other_head": 0.1,
              "fall_other_token": None, "fall_other_pair": 0.0, "attention": 0.3, "attention_elsewhere": 0.1,
              "confirmed": True}  # fmt: skip
    heads = {"n_groups": 64, "n_live": 60, "n_found": 4, "n_found_by_control": 0, "best_score": 0.4,
             "median_score": 0.01, "base_scores": [0.1, 0.7], "n_tokens": 500,
             "removal": {"clean": 1.0, "without_found": 1.5, "without_others": 1.1}}  # fmt: skip
    length = {"bits": 900.0, "bits_activations": 700.0, "bits_positions": 200.0, "bits_which": 300.0,
              "bits_shuffled": 1200.0, "bits_positions_shuffled": 400.0, "units_active": 20.0, "keys_named": 30.0,
              "normalised_mse": 0.4, "normalised_mse_sent": 0.404, "n_tokens": 500,
              "precision_reached": True}  # fmt: skip
    return {
        "attention": [
            *(run("qk-rank1", l0, 0.9 / l0, "qk_diagonal", one, features) for l0 in (2.0, 4.0, 8.0)),
            run("qk-heads", 4.0, 0.6, "qk_diagonal", every, features),
            run("arl-wide", 30.0, 0.5, "replacement", plain, layer),
            run("arl-narrow", 9.0, 0.6, "replacement", plain, layer),
        ],
        "explain": {
            "induction": [{"run": "qk-rank1-8", "seed": 0, "rank": 1, "n_live": 90, "n_induction": 12,
                           "features": [feature]}],
            "decisions": [decision],
            "planted": [{"position": "rotary", "features": 12, "seed": 0, "share_recovered": 0.9, "correlation": 0.95,
                         "normalised_mse": 0.05, "l0": 1.1, "l0_true": 0.8}],
        },
        "replacements": {
            "heads": [{"run": "arl-wide-30", "series": "arl-wide", "seed": 0, "induction": heads,
                       "skip_trigrams": {"n_heads": 1, "n_confirmed": 1, "chance": 0.25, "triples": [triple]}}],
            "description_lengths": [{"run": "arl-wide-30", "architecture": "replacement", "features": 64} | length],
        },
    }  # fmt: skip


def meant(low: float, high: float, seed: int) -> dict[str, Any]:
    """What a dictionary's features mean, with an interval of the bits that two tokens explain."""
    side = {"bits": {"median": (low + high) / 2, "interval": [low, high], "shuffled": 0.01}, "n_features": 9}
    return {"seed": seed, "predictability": {"from": side, "to": side}, "breadth": None, "n_live": 9}
