"""Cluster the head loadings of some trained dictionaries and fit power laws to the cluster sizes."""

from typing import Any

import torch

from crosshead.activations.cache import ActivationSource
from crosshead.analysis.clustering import ClusterConfig, analyse_loadings
from crosshead.dictionaries.base import Dictionary
from crosshead.dictionaries.registry import load_dictionary
from crosshead.io.files import atomic_directory, read_json, write_json
from flows._inputs import open_cache
from flows._runtime import Stage, main


def cluster(stage: Stage) -> None:
    """Analyse the loadings of every run that ``clusters.runs`` names, and of their nulls."""
    config = stage.section("clusters", ClusterConfig)
    cache = open_cache(stage)
    merged: dict[str, Any] = {"clusters": [], "sizes": [], "agreement": [], "hdbscan": [], "n_features": {}}
    merged["bootstraps"] = config.bootstraps
    for run in config.runs:
        if run not in stage.sections["runs"]:
            raise ValueError(f"{stage.source}: clusters.runs names {run!r}, which is not under runs; correct it")
        module = load_dictionary(stage.data / "runs" / run)
        live = torch.tensor(read_json(stage.data / "runs" / run / "feature_counts.json")) > 0
        found = analyse_loadings(run, _loadings(module, cache, run), live.numpy(), config)
        for key in ("clusters", "sizes", "agreement", "hdbscan"):
            merged[key] += found[key]
        merged["n_features"] |= found["n_features"]
    with atomic_directory(stage.data / "clusters") as directory:
        write_json(directory / "clusters.json", merged)


def _loadings(module: Dictionary, cache: ActivationSource, run: str) -> Any:
    """Per query head where key/value heads are shared: what a feature writes through each head."""
    per_query_head = getattr(module, "query_head_loadings", None)
    loadings = module.head_loadings() if per_query_head is None else per_query_head(cache.weights())
    if loadings is None:
        raise ValueError(f"clusters.runs names {run!r}, whose features have no fixed heads; name an MTC or value SAE")
    return loadings.double().numpy()


if __name__ == "__main__":
    main(cluster)
