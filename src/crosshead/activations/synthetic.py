"""A cache like a harvest's, written from arrays: for activations whose truth is known.

Shape legend: n contexts of a split, T positions; the sites' shapes are those of ``Site`` with n for B.

``ActivationCache`` and ``Batches`` read it as they read any other; patterns are recomputed from q and k wherever both
are there. Everything is stored as float32. Queries and keys are taken as they are: a spec with a rotary embedding is
refused.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from crosshead.activations.shards import CacheManifest, Column, FileRecord, ShardRecord, schema, write_shard
from crosshead.activations.sites import site_shape
from crosshead.dictionaries.base import LayerWeights, ModelDims, Site
from crosshead.io.files import atomic_directory, fingerprint, sha256_file, write_json
from crosshead.io.tensors import save_tensors
from crosshead.maths.patterns import AttentionSpec

__all__ = ["SyntheticSplit", "write_cache"]


class SyntheticSplit(NamedTuple):
    """The contexts of one split."""

    tokens: Int[Tensor, "n T"]
    """Token ids; position 0 is the beginning-of-text token, which never counts."""
    domains: list[str]
    """One per context."""
    sites: Mapping[Site, Tensor]
    """[n, *shape of the site]; never a pattern, which is recomputed."""


def write_cache(
    directory: Path | str,
    splits: Mapping[str, SyntheticSplit],
    *,
    dims: ModelDims,
    weights: Mapping[int, LayerWeights],
    specs: Mapping[int, AttentionSpec],
    description: Mapping[str, Any],
    shard_contexts: int = 256,
) -> None:
    """Write shards, output maps and manifest to ``directory``, whole or not at all.

    ``description`` says where the arrays come from; its fingerprint stands for the model's in the manifest. ValueError
    for splits of different sites or lengths, tensors of a wrong shape or not finite, layers without weights or spec.
    """
    if not splits:
        raise ValueError("there is no split to write; give at least train and heldout")
    first = next(iter(splits.values()))
    length = first.tokens.shape[1]
    for name, split in splits.items():
        _check_split(name, split, tuple(first.sites), dims, length)
    _check_layers({site.layer for site in first.sites}, weights, specs)
    columns = tuple(Column.of(site, "float32", dims, length) for site in sorted(first.sites))
    with atomic_directory(directory) as target:
        shards = {
            name: tuple(_write_shards(target, name, split, columns, length, shard_contexts))
            for name, split in splits.items()
        }
        tensors: dict[str, Tensor] = {}
        for layer, (W_O, b_O) in weights.items():
            tensors |= {f"W_O.{layer}": W_O, f"b_O.{layer}": b_O}
        save_tensors(target / "weights.safetensors", tensors)
        tokens = {name: _hash_tokens(split.tokens) for name, split in splits.items()}
        manifest = CacheManifest(
            model=fingerprint(description), corpus=fingerprint(tokens), context_length=length, dims=dims,
            columns=columns, specs=dict(specs), shards=shards, tokens=tokens,
            weights=FileRecord(**_file(target / "weights.safetensors")), harvest=dict(description),
        )  # fmt: skip
        write_json(target / "manifest.json", manifest.model_dump(mode="json"))


def _write_shards(
    directory: Path, name: str, split: SyntheticSplit, columns: tuple[Column, ...], length: int, size: int
) -> Iterator[ShardRecord]:
    shard_schema = schema(columns, length)
    for number, start in enumerate(range(0, len(split.tokens), size)):
        rows = slice(start, min(start + size, len(split.tokens)))
        path = directory / f"{name}-{number:05d}.arrow"
        values = {str(column.site): split.sites[column.site][rows].detach().float().cpu().numpy()
                  for column in columns}  # fmt: skip
        tokens = split.tokens[rows].cpu().numpy().astype(np.int32)
        write_shard(path, shard_schema, [{"tokens": tokens, "domain": split.domains[rows], **values}])
        yield ShardRecord(contexts=rows.stop - rows.start, **_file(path))


def _check_split(name: str, split: SyntheticSplit, sites: tuple[Site, ...], dims: ModelDims, length: int) -> None:
    n_contexts = len(split.tokens)
    if not n_contexts or len(split.domains) != n_contexts or split.tokens.shape[1] != length:
        raise ValueError(f"split {name} has tokens {tuple(split.tokens.shape)} and {len(split.domains)} domains; give "
                         f"one domain per context, and {length} tokens in each, as in the first split")  # fmt: skip
    if set(split.sites) != set(sites):
        raise ValueError(f"split {name} holds {', '.join(map(str, sorted(split.sites)))}, the first split "
                         f"{', '.join(map(str, sorted(sites)))}; give every split the same sites")  # fmt: skip
    for site, tensor in split.sites.items():
        if site.name == "pattern":
            raise ValueError(f"site {site} is recomputed from q and k, never stored; leave it out")
        expected = (n_contexts, *site_shape(site, dims, length))
        if tuple(tensor.shape) != expected:
            raise ValueError(f"split {name}, site {site}: shape {tuple(tensor.shape)}, expected {expected}; "
                             "correct it or dims")  # fmt: skip
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"split {name}, site {site} holds values that are not finite; look for where they arise")


def _check_layers(layers: set[int], weights: Mapping[int, LayerWeights], specs: Mapping[int, AttentionSpec]) -> None:
    for layer in sorted(layers | set(specs)):
        if layer not in weights or layer not in specs:
            raise ValueError(f"layer {layer} lacks its output map or its attention spec; give both")
        if specs[layer].rotary is not None:
            raise ValueError(f"the spec of layer {layer} names the rotary tables {specs[layer].rotary!r}, which no "
                             "synthetic cache holds; undo the rotation and set rotary: null")  # fmt: skip


def _file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _hash_tokens(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().numpy().astype("<i4").tobytes()).hexdigest()
