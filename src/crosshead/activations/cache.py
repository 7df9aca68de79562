"""Activations of a corpus by context and site: read from shards, or computed whenever they are asked for.

Both kinds are opened from the same directory. What a harvest in the mode ``stream`` leaves has everything but shards;
its contexts run through the base model at every reading.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from crosshead.activations.shards import CacheManifest, Column, FileRecord, open_shard, schema
from crosshead.activations.sites import recompute_patterns, stored_sites
from crosshead.dictionaries.base import Batch, LayerWeights, ModelDims, Site
from crosshead.io.files import read_json, sha256_file, write_json
from crosshead.maths.patterns import AttentionSpec

__all__ = ["ActivationCache", "ActivationSource", "read_manifest"]

_ADVICE = "delete the cache and run the harvest stage again"


class _Group(NamedTuple):
    """Contexts that lie together in one record batch."""

    first: int
    """Index of its first context within the split."""
    rows: pa.RecordBatch


class ActivationSource(ABC):
    """Contexts of a corpus as batches of activations; described by the manifest in ``directory``."""

    def __init__(self, directory: Path, manifest: CacheManifest):
        self.directory = directory
        self.manifest = manifest
        self._columns = {column.site: column for column in manifest.columns}

    @abstractmethod
    def n_contexts(self, split: str) -> int:
        """Number of contexts of a split. ValueError for an unknown one."""

    @abstractmethod
    def domains(self, split: str) -> list[str]:
        """The domain of every context, in order."""

    @abstractmethod
    def tokens(self, split: str, indices: Sequence[int]) -> Tensor:
        """Token ids [n, T] of the given contexts."""

    @abstractmethod
    def stored(self, split: str, indices: Sequence[int], sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Stored sites of the given contexts, float32."""

    @abstractmethod
    def rows(
        self, split: str, contexts: np.ndarray, positions: np.ndarray, sites: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "n *widths"]]:
        """Single positions, one of each given context, at stored sites; float32, the site's shape without B and T.

        ValueError for an unknown split or site, an index out of range, or where no activations are stored.
        """

    @property
    def dims(self) -> ModelDims:
        """Widths of the base model."""
        return self.manifest.dims

    @property
    def specs(self) -> dict[int, AttentionSpec]:
        """Attention spec of every layer the cache knows."""
        return self.manifest.specs

    @property
    def sites(self) -> tuple[Site, ...]:
        """The stored sites; a layer's pattern can be read as well where its q and k are stored."""
        return tuple(self._columns)

    @property
    def lowest_layer(self) -> int:
        """The lowest layer with a stored site: ``v_shared_input`` is made of its residual input."""
        return min(column.layer for column in self.manifest.columns)

    @property
    def context_length(self) -> int:
        """Positions of every context."""
        return self.manifest.context_length

    def weights(self) -> dict[int, LayerWeights]:
        """The output map of every layer the cache knows."""
        with self._open_weights() as tensors:
            return {layer: LayerWeights(tensors.get_tensor(f"W_O.{layer}"), tensors.get_tensor(f"b_O.{layer}"))
                    for layer in self.specs}  # fmt: skip

    def rotary(self, layer: int) -> tuple[Float[Tensor, "T R"], Float[Tensor, "T R"]] | None:
        """The cos and sin that undo a layer's rotation of q and k (``undo_rotation``); None: they are not rotated."""
        if layer not in self.specs:
            raise ValueError(f"the cache knows layers {', '.join(map(str, self.specs))}, got {layer}; "
                             "add it to harvest.sites")  # fmt: skip
        name = self.specs[layer].rotary
        if name is None:
            return None
        with self._open_weights() as tensors:
            return tensors.get_tensor(f"{name}.cos"), tensors.get_tensor(f"{name}.sin")

    def check_sites(self, sites: Sequence[Site]) -> None:
        """ValueError unless every site is stored or, for patterns, can be recomputed."""
        missing = [site for site in stored_sites(sites) if site not in self._columns]
        if missing:
            have = ", ".join(map(str, self.sites))
            raise ValueError(f"the cache {self.directory} has no site {', '.join(map(str, missing))}; it holds {have}; "
                             "add it to harvest.sites")  # fmt: skip

    def read(
        self, split: str, indices: Sequence[int], sites: Sequence[Site], *, device: torch.device | str = "cpu"
    ) -> Batch:
        """The given contexts at the given sites, float32; patterns are recomputed on ``device``.

        The mask is True everywhere but at position 0, the beginning-of-text token. ValueError for an unknown split or
        site, or an index out of range.
        """
        self.check_sites(sites)
        n_contexts = self.n_contexts(split)
        outside = [index for index in indices if not 0 <= index < n_contexts]
        if outside:
            raise ValueError(f"context {outside[0]} is out of range; {split} has contexts 0 to {n_contexts - 1}")
        found = {site: tensor.to(device) for site, tensor in self.stored(split, indices, stored_sites(sites)).items()}
        tokens = self.tokens(split, indices)
        mask = torch.ones(tokens.shape, dtype=torch.bool)
        mask[:, 0] = False
        return Batch(recompute_patterns(found, sites, self.specs), mask.to(device), tokens.to(device))

    def _open_weights(self) -> safe_open:
        return safe_open(self.directory / self.manifest.weights.file, framework="pt")


class ActivationCache(ActivationSource):
    """A directory of shards with its manifest. Open one with ``ActivationCache.open``.

    Shards stay memory-mapped: reading touches only the pages of the contexts and sites asked for.
    """

    def __init__(self, directory: Path, manifest: CacheManifest, groups: dict[str, list[_Group]]):
        super().__init__(directory, manifest)
        self._groups = groups

    @classmethod
    def open(
        cls,
        directory: Path | str,
        *,
        verify: Literal["structure", "sha256"] = "structure",
        remember: Path | None = None,
        model: str | None = None,
        corpus: str | None = None,
    ) -> "ActivationCache":
        """Open what ``harvest`` wrote.

        ``structure`` checks sizes, row counts and columns, which finds missing and truncated shards without reading
        them; ``sha256`` reads every shard and finds any change. With ``remember``, a JSON file that lists files found
        intact, a shard is read again only when its size, time or inode is another. ``model`` and ``corpus`` are the
        fingerprints that the caller expects. ValueError for a damaged cache and for one of another model or corpus.
        """
        directory = Path(directory)
        manifest = read_manifest(directory, model=model, corpus=corpus)
        if not manifest.shards:
            raise ValueError(f"{directory} is of a harvest that only streams; open it as LiveActivations, or run the "
                             "harvest stage with harvest.mode: cache")  # fmt: skip
        if verify == "sha256":
            _check_hashes(directory, [record for shards in manifest.shards.values() for record in shards], remember)
        shard_schema = schema(manifest.columns, manifest.context_length)
        groups: dict[str, list[_Group]] = {}
        for split, shards in manifest.shards.items():
            groups[split], first = [], 0
            for record in shards:
                for rows in open_shard(directory / record.file, record, shard_schema):
                    groups[split].append(_Group(first, rows))
                    first += rows.num_rows
        return cls(directory, manifest, groups)

    def n_contexts(self, split: str) -> int:
        last = self._split(split)[-1]
        return last.first + last.rows.num_rows

    def domains(self, split: str) -> list[str]:
        return [domain for group in self._split(split) for domain in group.rows.column("domain").to_pylist()]

    def tokens(self, split: str, indices: Sequence[int]) -> Tensor:
        out = np.empty((len(indices), self.context_length), dtype=np.int64)
        self._fill(out, split, indices, "tokens")
        return torch.from_numpy(out)

    def stored(self, split: str, indices: Sequence[int], sites: Sequence[Site]) -> dict[Site, Tensor]:
        return {site: self._gather(split, indices, self._columns[site]) for site in sites}

    def rows(
        self, split: str, contexts: np.ndarray, positions: np.ndarray, sites: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "n *widths"]]:
        self.check_sites(sites)
        if patterns := [site for site in sites if site.name == "pattern"]:
            raise ValueError(f"site {patterns[0]} is no row of a position; read whole contexts instead")
        for what, indices, end in (("context", contexts, self.n_contexts(split)),
                                   ("position", positions, self.context_length)):  # fmt: skip
            outside = indices[(indices < 0) | (indices >= end)]
            if len(outside):
                raise ValueError(f"{what} {outside[0]} is out of range; {split} has {what}s 0 to {end - 1}")
        return {site: self._gather_rows(split, contexts, positions, self._columns[site]) for site in sites}

    def _gather_rows(
        self, split: str, contexts: np.ndarray, positions: np.ndarray, column: Column
    ) -> Float[Tensor, "n *widths"]:
        # Positions are the last axis but one at every stored site: behind the heads, where there are heads.
        *heads, length, width = column.shape
        out = np.empty((len(contexts), *heads, width), dtype=np.float32)
        groups = self._split(split)
        of_group = np.searchsorted([group.first for group in groups], contexts, side="right") - 1
        for number in np.unique(of_group):
            group, here = groups[number], np.flatnonzero(of_group == number)
            flat = group.rows.column(str(column.site)).flatten().to_numpy(zero_copy_only=True)
            whole = flat.reshape(group.rows.num_rows, -1, length, width)
            found = whole[contexts[here] - group.first, :, positions[here]]
            out[here] = found.reshape(len(here), *heads, width)
        return torch.from_numpy(out)

    def _gather(self, split: str, indices: Sequence[int], column: Column) -> Float[Tensor, "n *shape"]:
        out = np.empty((len(indices), *column.shape), dtype=np.float32)
        self._fill(out.reshape(len(indices), -1), split, indices, str(column.site))
        return torch.from_numpy(out)

    def _fill(self, out: np.ndarray, split: str, indices: Sequence[int], name: str) -> None:
        """Copy one column of some contexts into ``out`` [n, width]."""
        groups = self._split(split)
        starts = [group.first for group in groups]
        for i, index in enumerate(indices):
            group = groups[bisect_right(starts, index) - 1]
            # A view of the mapped file: only the row that is copied is ever read from disk.
            flat = group.rows.column(name).flatten().to_numpy(zero_copy_only=True)
            out[i] = flat.reshape(group.rows.num_rows, -1)[index - group.first]

    def _split(self, split: str) -> list[_Group]:
        if split not in self._groups:
            raise ValueError(f"the cache has no split {split!r}; it has {', '.join(self._groups)}")
        return self._groups[split]


def read_manifest(directory: Path, *, model: str | None = None, corpus: str | None = None) -> CacheManifest:
    """The manifest of a harvest, its weights file checked.

    ``model`` and ``corpus`` are the fingerprints that the caller expects. ValueError for other ones, or damage.
    """
    manifest = _parsed_manifest(directory)
    for what, expected, got in (("model", model, manifest.model), ("corpus", corpus, manifest.corpus)):
        if expected is not None and expected != got:
            raise ValueError(f"the cache {directory} was made with another {what} (fingerprint {got}, expected "
                             f"{expected}); run the harvest stage again")  # fmt: skip
    _check_hash(directory, manifest.weights)
    return manifest


def _parsed_manifest(directory: Path) -> CacheManifest:
    try:
        return CacheManifest.model_validate(read_json(directory / "manifest.json"))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise ValueError(f"{directory}/manifest.json is not a cache manifest ({where}: {fault['msg']}); "
                         f"{_ADVICE}") from error  # fmt: skip


def _check_hashes(directory: Path, records: Sequence[FileRecord], remember: Path | None) -> None:
    """Hash every file that is not known to be intact, and note those that are."""
    known: dict[str, list[Any]] = {}
    if remember is not None and remember.exists():
        try:
            known = read_json(remember)
        except ValueError:
            known = {}  # a note that cannot be read costs a second look, no more
    marks = {}
    for record in records:
        path = directory / record.file
        if not path.exists():
            raise ValueError(f"shard {path} is missing; {_ADVICE}")
        stat = path.stat()
        marks[str(path)] = mark = [record.sha256, stat.st_size, stat.st_mtime_ns, stat.st_ino]
        if known.get(str(path)) != mark:
            _check_hash(directory, record)
    if remember is not None and any(known.get(path) != mark for path, mark in marks.items()):
        write_json(remember, known | marks)


def _check_hash(directory: Path, record: FileRecord) -> None:
    path = directory / record.file
    if not path.exists():
        raise ValueError(f"{path} is missing; {_ADVICE}")
    if (got := sha256_file(path)) != record.sha256:
        raise ValueError(f"{path} is damaged: its sha256 is {got}, the manifest says {record.sha256}; {_ADVICE}")
