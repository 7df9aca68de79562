"""Arrow shards of whole contexts, and the manifest that says what they hold.

One row is one context; one column is one site, a fixed-size list of context_length times the site's widths. The IPC
*file* format is used because it ends in a footer: a truncated file does not open, where a stream would look complete.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from crosshead.activations.sites import site_shape
from crosshead.dictionaries.base import ModelDims, Site, SiteName
from crosshead.io.files import atomic_path
from crosshead.maths.patterns import AttentionSpec

__all__ = ["CacheManifest", "Column", "FileRecord", "ShardRecord", "open_shard", "row_bytes", "schema", "write_shard"]

Dtype = Literal["float32", "float16"]


class Column(BaseModel):
    """One stored site."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    """Base-model layer."""
    name: SiteName
    """Name of the site."""
    dtype: Dtype
    """Element type on disk."""
    shape: tuple[int, ...]
    """Shape of one context."""

    @property
    def site(self) -> Site:
        """The site this column holds."""
        return Site(self.layer, self.name)

    @classmethod
    def of(cls, site: Site, dtype: Dtype, dims: ModelDims, context_length: int) -> "Column":
        """The column of a site; q and k are always float32, because patterns recomputed from float16 are too coarse."""
        stored = "float32" if site.name in ("q", "k") else dtype
        return cls(layer=site.layer, name=site.name, dtype=stored, shape=site_shape(site, dims, context_length))


class FileRecord(BaseModel):
    """A file of the cache."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    """Name inside the cache directory."""
    bytes: int
    """Its size."""
    sha256: str
    """Hash of its bytes."""


class ShardRecord(FileRecord):
    """A shard."""

    contexts: Annotated[int, Field(gt=0)]
    """Rows it holds."""


class CacheManifest(BaseModel):
    """manifest.json: everything about a cache that is not an activation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    """Version of this layout."""
    model: str
    """Fingerprint of the base model."""
    corpus: str
    """Fingerprint of the corpus."""
    context_length: int
    """Positions of every context."""
    dims: ModelDims
    """Widths of the base model."""
    columns: tuple[Column, ...]
    """The stored sites, in the order of the shards' columns (after ``tokens`` and ``domain``)."""
    specs: dict[int, AttentionSpec]
    """Attention spec of every layer with a stored site."""
    shards: dict[str, tuple[ShardRecord, ...]]
    """Per split, in order."""
    tokens: dict[str, str]
    """Per split, sha256 of its token ids (little-endian int32, row by row)."""
    weights: FileRecord
    """W_O.{layer}, b_O.{layer} and the rotary tables."""
    harvest: dict[str, Any]
    """The harvest section that made it, layers resolved."""


def schema(columns: Sequence[Column], context_length: int) -> pa.Schema:
    """The Arrow schema of a shard."""
    types = {"float32": pa.float32(), "float16": pa.float16()}
    fields = [pa.field("tokens", pa.list_(pa.int32(), context_length), nullable=False),
              pa.field("domain", pa.utf8(), nullable=False)]  # fmt: skip
    fields += [pa.field(str(column.site), pa.list_(types[column.dtype], int(np.prod(column.shape))), nullable=False)
               for column in columns]  # fmt: skip
    return pa.schema(fields)


def row_bytes(columns: Sequence[Column], context_length: int) -> int:
    """Bytes of one context on disk, apart from some padding."""
    return 4 * context_length + sum(np.dtype(column.dtype).itemsize * int(np.prod(column.shape)) for column in columns)


def write_shard(path: Path, shard_schema: pa.Schema, groups: Iterable[Mapping[str, Any]]) -> None:
    """Write groups of contexts ({column: array [n, ...] or list of strings}) as one shard, whole or not at all.

    Only one group is in memory at a time.
    """
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, shard_schema) as writer,
    ):
        for group in groups:
            arrays = [_arrow_array(group[field.name], field.type) for field in shard_schema]
            writer.write_batch(pa.record_batch(arrays, schema=shard_schema))


def _arrow_array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.FixedSizeListType):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind.value_type), kind.list_size)
    return pa.array(values, kind)


def open_shard(path: Path, record: ShardRecord, shard_schema: pa.Schema) -> list[pa.RecordBatch]:
    """Memory-map a shard: record batches whose buffers are the file's own pages, read when they are touched.

    ValueError when it is missing, truncated, or holds other rows or columns than the manifest says.
    """
    advice = "delete the cache and run the harvest stage again"
    if not path.exists():
        raise ValueError(f"shard {path} is missing; {advice}")
    if (size := path.stat().st_size) != record.bytes:
        raise ValueError(f"shard {path} is damaged: it has {size} bytes, the manifest says {record.bytes}; {advice}")
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"shard {path} is damaged ({error}); {advice}") from error
    rows = sum(batch.num_rows for batch in batches)
    if rows != record.contexts or not reader.schema.equals(shard_schema):
        names = ", ".join(reader.schema.names)
        raise ValueError(f"shard {path} holds {rows} contexts of columns {names}, the manifest says "
                         f"{record.contexts} of {', '.join(shard_schema.names)}; {advice}")  # fmt: skip
    return batches
