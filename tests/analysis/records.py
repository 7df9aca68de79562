"""Made-up documents of every stage, for findings and reports."""

from typing import Any

import numpy as np

from crosshead.analysis.one_head import null_record

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
    labels = {"induction": {"count": 7, "expected": 0.5}, "succession": {"count": 1, "expected": 0.2}}
    heads = {
        "survey_heads": [{"layer": 17, "head": 3, "score": 0.8}],
        "share_on_survey_heads": 0.8,
        "expected_share": 0.3,
    }
    read = {"n_live": 120, "labels": labels, "breadth": {"median": 4.0, "interval": [3.5, 4.5]},
            "predictability": {"from": side, "to": side}, "induction_heads": heads,
            "examples": [{"feature": 5, "label": "induction", "texts": ["a | b [c] `d`\n e"]}]}  # fmt: skip
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
         "found": True, "share_recovered": 0.9},
        {"question": "toys", "toy": "skip-trigram", "seed": 0, "accuracy": 0.99, "ratio": 0.7, "null_ratio": 0.97,
         "superposed": True},
        *({"question": "phases", "mixing": m, "noise": n, "planted_l0": 8, "share_recovered": 0.5 + m / 4 - n / 4}
          for m in (0.0, 1.0) for n in (0.0, 0.5)),
    ]  # fmt: skip
    return {
        "nulls": null_record("top1-110", 0.1, 0.1, rows),
        "planted": {"rows": planted, "seeds": [0], "commit_seed": None},
        "meaning": {
            "runs": dict.fromkeys(("mtc-60", "top1-60", "attn-out-sae-60"), read),
            "enrichment": [cluster | {"label": "induction", "n": 6, "expected": 0.7, "p_value": 1e-6, "q_value": 1e-4}],
            "enrichment_summary": {"mtc-60": {"discoveries": 4, "expected_under_shuffle": 0.3, "content_discoveries": 2,
                                              "content_expected_under_shuffle": 0.1}},
            "ov_dimensions": [cluster | {"size": size, "effective_rank": 0.6 * size, "random_low": 0.7 * size,
                                         "random_mean": 0.8 * size, "random_high": 0.9 * size} for size in (4, 12, 40)],
            "size_correlations": {"mtc-60": {"induction": correlation, "skip_trigram": correlation}},
            "modality": {"mtc-60": {"loadings": None, "ov_dimension": test}},
        },
    }  # fmt: skip
