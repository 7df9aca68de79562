"""What several stages read."""

from crosshead.activations.base_model import load_model
from crosshead.activations.cache import ActivationCache, ActivationSource, read_manifest
from crosshead.activations.corpus import Corpus
from crosshead.activations.live import LiveActivations
from crosshead.activations.provenance import recorded_fingerprint
from crosshead.io.files import read_json
from flows._runtime import Stage, repository_root

__all__ = ["open_cache"]


def open_cache(stage: Stage, device: str = "cpu") -> ActivationSource:
    """The profile's activations, refused when they are damaged or of another model or corpus than the profile's.

    Shards are hashed when they are first seen; work/verified-<profile>.json remembers which files were intact. Where
    the harvest only streams, they are computed on ``device``.
    """
    directory = stage.data / "cache"
    if not read_manifest(directory).shards:
        model = load_model(stage.data / "model", device=device)
        return LiveActivations(directory, model, Corpus.load(stage.data / "corpus"))
    manifest = stage.data / "corpus" / "manifest.json"
    described = read_json(manifest)
    if not isinstance(described, dict) or not isinstance(described.get("fingerprint"), str):
        raise ValueError(f"{manifest} names no fingerprint; delete its directory and run the corpus stage again")
    return ActivationCache.open(
        directory,
        verify="sha256",
        remember=repository_root() / "work" / f"verified-{stage.profile}.json",
        model=recorded_fingerprint(stage.data / "model"),
        corpus=described["fingerprint"],
    )
