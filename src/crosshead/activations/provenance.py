"""Which model a directory holds, told by the hashes it was made with and without loading it."""

from collections.abc import Mapping
from pathlib import Path

from crosshead.io.files import fingerprint, read_json

__all__ = ["model_fingerprint", "recorded_fingerprint"]


def model_fingerprint(file_hashes: Mapping[str, str]) -> str:
    """Sixteen hex digits over a model's configuration and weights, from the sha256 of its files by name."""
    return fingerprint({name: digest for name, digest in file_hashes.items()
                        if name == "config.json" or name.endswith(".safetensors")})  # fmt: skip


def recorded_fingerprint(directory: Path) -> str:
    """The fingerprint of the model that ``prepare_model`` wrote. ValueError when its provenance.json is damaged."""
    recorded = read_json(directory / "provenance.json")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("files"), dict):
        raise ValueError(
            f"{directory}/provenance.json lists no files; delete the directory and run the model stage again"
        )
    return model_fingerprint(recorded["files"])
