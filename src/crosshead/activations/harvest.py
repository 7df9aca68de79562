"""Run the base model over a corpus and keep what it did: contexts in, shards out.

Shards are made one by one in ``work/<fingerprint>/cache``, each under a temporary name until it is whole; the finished
directory then takes the place of the output. So a killed harvest goes on at the first missing shard, and what it ends
with does not depend on whether it was killed.
"""

import errno
import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.capture import attention_specs, capture, layer_weights, rotary_tables
from crosshead.activations.corpus import SPLITS, Corpus, Split
from crosshead.activations.shards import (
    CacheManifest,
    Column,
    FileRecord,
    ShardRecord,
    row_bytes,
    schema,
    write_shard,
)
from crosshead.activations.taps import check_site
from crosshead.dictionaries.base import Site
from crosshead.io.files import FULL_DISK, atomic_directory, fingerprint, sha256_file, write_json
from crosshead.io.tensors import save_tensors

__all__ = ["HarvestConfig", "LayerSites", "harvest", "harvest_fingerprint"]

Progress = Callable[[int, int], None]

StoredName = Literal["q", "k", "v", "v_shared_input", "resid_in", "attn_out", "mlp_in", "mlp_out", "resid_out"]
_FLOAT16_MAX = torch.finfo(torch.float16).max


class LayerSites(BaseModel):
    """Which sites of one layer to keep."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: Literal["first", "second", "adjacent"] | Annotated[int, Field(ge=0)]
    """A layer the survey names, or a number."""
    names: Annotated[tuple[StoredName, ...], Field(min_length=1)]
    """Sites; patterns are not stored but recomputed wherever q and k are. ``v_shared_input``: this layer's values made
    of the residual input of the lowest layer that the harvest keeps a site of (usually ``first``)."""


class HarvestConfig(BaseModel):
    """What to keep and how to cut it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sites: Annotated[tuple[LayerSites, ...], Field(min_length=1)]
    """Entries that name the same layer are joined."""
    mode: Literal["cache", "stream"] = "cache"
    """``stream`` writes no activations: later stages compute the batches they read, the same ones in the same order.
    For a disk that cannot hold them; each reading costs a forward pass."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of everything but q and k, which are always float32. float16 is refused where an activation does not fit."""
    shard_contexts: Annotated[int, Field(gt=0)] = 64
    """Contexts in a shard; a killed harvest loses at most one shard."""
    batch_contexts: Annotated[int, Field(gt=0)] = 8
    """Contexts in a forward pass."""

    @model_validator(mode="after")
    def _a_stream_is_as_the_model_computes(self) -> "HarvestConfig":
        if self.mode == "stream" and self.dtype != "float32":
            raise ValueError(f"mode stream stores nothing, so dtype {self.dtype} has no meaning; leave it out")
        return self

    def resolve(self, layers: Mapping[str, int]) -> tuple[Site, ...]:
        """The sites with layer names replaced by the survey's choice, sorted. ValueError for a name not chosen."""
        sites: set[Site] = set()
        for entry in self.sites:
            if isinstance(entry.layer, str) and entry.layer not in layers:
                known = ", ".join(layers) or "none"
                raise ValueError(f"harvest.sites names the layer {entry.layer!r}, the survey chose {known}; "
                                 "give a number")  # fmt: skip
            layer = layers[entry.layer] if isinstance(entry.layer, str) else entry.layer
            sites |= {Site(layer, name) for name in entry.names}
        return tuple(sorted(sites))


def harvest(
    model: LanguageModel,
    corpus: Corpus,
    config: HarvestConfig,
    layers: Mapping[str, int],
    directory: Path | str,
    *,
    work: Path | str,
    code: str = "",
    progress: Progress | None = None,
) -> None:
    """Write the activation cache of a corpus to ``directory``, replacing an earlier one when it is complete.

    Unfinished shards are kept under ``work/<fingerprint>`` and used by the next call with the same inputs and the same
    ``code``, a name for the version of the programs that make them; ``progress``
    is told (contexts done, contexts in all) before every forward pass and after every shard. Memory does not grow with
    the corpus. ValueError for a layer out of range, a context longer than the model allows, an empty corpus or one of
    another tokenizer, an activation that float16 cannot hold, or another process at work on the same harvest, OSError
    for a full disk; the output is then as it was.
    """
    sites = config.resolve(layers)
    for site in sites:
        check_site(model, site)
    corpus.check_tokenizer(model.tokenizer)
    for split in SPLITS:
        if corpus.n_contexts(split) == 0:
            raise ValueError(f"the corpus has no {split} contexts; raise corpus.{split}_contexts")
    columns = tuple(Column.of(site, config.dtype, model.dims, corpus.context_length) for site in sites)
    state = Path(work) / harvest_fingerprint(model, corpus, config, sites, code)
    with _full_disk_told(state), _locked(state):
        job = _Job(model, corpus, config, columns, state / "cache", progress or (lambda done, total: None))
        job.directory.mkdir(exist_ok=True)
        for leftover in job.directory.glob(".*.tmp"):
            leftover.unlink()
        if config.mode == "cache":
            _check_space(job.directory, job.n_contexts * row_bytes(columns, corpus.context_length))
            job.write_shards()
        job.write_weights()
        write_json(job.directory / "manifest.json", job.manifest().model_dump(mode="json"))
        _publish(job.directory, Path(directory))
        shutil.rmtree(state)


def harvest_fingerprint(
    model: LanguageModel, corpus: Corpus, config: HarvestConfig, sites: Sequence[Site], code: str = ""
) -> str:
    """Sixteen hex digits over everything that decides a cache's bytes; the name of its folder under ``work``."""
    parameter = next(model.model.parameters())
    return fingerprint({
        "format": 1, "code": code, "model": model.fingerprint, "corpus": corpus.fingerprint,
        "sites": [str(site) for site in sites],
        "config": config.model_dump(mode="json", exclude={"sites"}), "precision": str(parameter.dtype),
        "device": parameter.device.type, "threads": torch.get_num_threads(),
    })  # fmt: skip


@dataclass(frozen=True)
class _Job:
    """A harvest under way."""

    model: LanguageModel
    corpus: Corpus
    config: HarvestConfig
    columns: tuple[Column, ...]
    directory: Path
    progress: Progress

    @property
    def layers(self) -> list[int]:
        return sorted({column.layer for column in self.columns})

    @property
    def n_contexts(self) -> int:
        return sum(self.corpus.n_contexts(split) for split in SPLITS)

    def plan(self, split: Split) -> Iterator[tuple[Path, slice]]:
        """Every shard of a split and the contexts it holds."""
        size, n_contexts = self.config.shard_contexts, self.corpus.n_contexts(split)
        for i, start in enumerate(range(0, n_contexts, size)):
            yield self.directory / f"{split}-{i:05d}.arrow", slice(start, min(start + size, n_contexts))

    def write_shards(self) -> None:
        """Make every shard that is not there yet."""
        shard_schema = schema(self.columns, self.corpus.context_length)
        done = 0
        for split in SPLITS:
            domains = self.corpus.domains(split)
            for path, rows in self.plan(split):
                if not path.exists():
                    write_shard(path, shard_schema, self._groups(split, rows, domains, done))
                done += rows.stop - rows.start
                self.progress(done, self.n_contexts)

    def _groups(self, split: Split, rows: slice, domains: list[str], done: int) -> Iterator[dict[str, Any]]:
        """One group of a shard per forward pass."""
        for start in range(rows.start, rows.stop, self.config.batch_contexts):
            self.progress(done + start - rows.start, self.n_contexts)
            group = slice(start, min(start + self.config.batch_contexts, rows.stop))
            tokens = self.corpus.tokens(split, group)
            captured = capture(self.model, tokens, [column.site for column in self.columns])
            values = {str(column.site): _as_stored(captured[column.site], column) for column in self.columns}
            yield {"tokens": tokens.numpy().astype(np.int32), "domain": domains[group], **values}

    def write_weights(self) -> None:
        """Write output maps and rotary tables of the layers."""
        tensors: dict[str, Tensor] = {}
        for layer in self.layers:
            weights = layer_weights(self.model, layer)
            tensors |= {f"W_O.{layer}": weights.W_O, f"b_O.{layer}": weights.b_O}
            tables = rotary_tables(self.model, layer, self.corpus.context_length)
            if tables is not None:
                tensors |= {f"rotary.{layer}.cos": tables[0], f"rotary.{layer}.sin": tables[1]}
        save_tensors(self.directory / "weights.safetensors", tensors)

    def manifest(self) -> CacheManifest:
        """Describe what has been written."""
        return CacheManifest(
            model=self.model.fingerprint,
            corpus=self.corpus.fingerprint,
            context_length=self.corpus.context_length,
            dims=self.model.dims,
            columns=self.columns,
            specs=attention_specs(self.model, self.layers),
            shards={
                split: tuple(ShardRecord(contexts=rows.stop - rows.start, **_file(path))
                             for path, rows in self.plan(split))
                for split in SPLITS if self.config.mode == "cache"
            },
            tokens={split: _hash_tokens(self.corpus, split) for split in SPLITS},
            weights=FileRecord(**_file(self.directory / "weights.safetensors")),
            harvest=self.config.model_dump(mode="json", exclude={"sites"}),
        )  # fmt: skip


def _file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _as_stored(tensor: Tensor, column: Column) -> np.ndarray:
    """The array that goes to disk. ValueError where it is not finite or too large for float16."""
    largest = float(tensor.abs().max())
    if not np.isfinite(largest):
        raise ValueError(f"site {column.site} holds values that are not finite; run the model in float32")
    if column.dtype == "float16" and largest > _FLOAT16_MAX:
        raise ValueError(f"site {column.site} reaches {largest:.6g}, float16 holds at most {_FLOAT16_MAX:.6g}; "
                         "set harvest.dtype: float32")  # fmt: skip
    return tensor.to(getattr(torch, column.dtype)).cpu().numpy()


def _hash_tokens(corpus: Corpus, split: Split, step: int = 1024) -> str:
    digest = hashlib.sha256()
    for start in range(0, corpus.n_contexts(split), step):
        digest.update(corpus.tokens(split, slice(start, start + step)).numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def _publish(finished: Path, directory: Path) -> None:
    """Put the finished directory in the place of an earlier one: by renaming where both lie on one file system."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    earlier = finished.with_name("earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    try:
        if directory.exists():
            directory.replace(earlier)
        finished.replace(directory)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with atomic_directory(directory) as target:
            shutil.copytree(finished, target, dirs_exist_ok=True)


def _check_space(unfinished: Path, needed: int) -> None:
    """Refuse to begin what cannot end: better now than after an hour."""
    have = sum(path.stat().st_size for path in unfinished.glob("*.arrow"))
    free = shutil.disk_usage(unfinished).free
    if needed - have > free:
        raise ValueError(f"the harvest needs {(needed - have) / 1e9:.2f} GB more under {unfinished}, "
                         f"{free / 1e9:.2f} GB are free; free some space or "
                         "lower corpus.train_contexts")  # fmt: skip


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """Hold a harvest's folder; the lock goes with the process, however it ends."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work on this harvest (lock {state}/lock); wait for it") from None
        yield


@contextmanager
def _full_disk_told(state: Path) -> Iterator[None]:
    """Say a full disk in one sentence (OSError); shards that are whole stay for the next attempt."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise OSError(error.errno, "the disk is full while writing the cache; free some space and run the harvest "
                      "stage again, it goes on where it stopped", str(state)) from error  # fmt: skip
