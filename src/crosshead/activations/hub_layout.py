"""A directory in hub layout: config.json, safetensors weights, tokenizer files and, if we wrote it, provenance.json."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from crosshead.io.files import read_json, sha256_file

__all__ = ["MODEL_FILES", "check_weight_files", "file_hashes", "one_line", "quiet_transformers", "read_config"]

# What belongs to a model; anything else in a local directory (readme, code, pickles) is neither copied nor read.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip


def read_config(directory: Path) -> PretrainedConfig:
    """The configuration of the text model. ValueError when it is missing, damaged or needs code of its own."""
    if not (directory / "config.json").exists():
        raise ValueError(f"{directory} holds no config.json, so it is no model in hub layout; "
                         "run the model stage or correct the path")  # fmt: skip
    read_json(directory / "config.json")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{directory}/config.json describes no model that transformers knows ({one_line(error)}); "
                         "choose a model that needs no code of its own") from error  # fmt: skip
    return config.get_text_config()


def check_weight_files(directory: Path) -> None:
    """ValueError when a directory holds no safetensors weights."""
    if not any(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} holds no *.safetensors weights; run the model stage again, or convert the "
                         "model's other weight files to safetensors")  # fmt: skip


def file_hashes(directory: Path) -> dict[str, str]:
    """sha256 of configuration, weights and tokenizer files, checked against provenance.json where there is one."""
    check_weight_files(directory)
    recorded = {}
    if (directory / "provenance.json").exists():
        recorded = read_json(directory / "provenance.json").get("files", {})
    names = recorded or {path.name for pattern in MODEL_FILES for path in directory.glob(pattern)}
    hashes = {}
    for name in sorted(names):
        if not (directory / name).exists():
            raise ValueError(f"{directory} lacks {name}, which its provenance.json lists; run the model stage again")
        hashes[name] = sha256_file(directory / name)
        if recorded and hashes[name] != recorded[name]:
            raise ValueError(f"{directory}/{name} is damaged: its sha256 is {hashes[name]}, provenance.json says "
                             f"{recorded[name]}; delete the directory and run the model stage again")  # fmt: skip
    return hashes


def one_line(error: Exception) -> str:
    """What an exception says, on one line of at most 200 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice out of a stage's log; the settings are put back."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
