"""What several stages read."""

from crosshead.activations.cache import ActivationCache
from crosshead.activations.provenance import recorded_fingerprint
from crosshead.io.files import read_json
from flows._runtime import Stage, repository_root

__all__ = ["open_cache"]


def open_cache(stage: Stage) -> ActivationCache:
    """The profile's activations, refused when they are damaged or of another model or corpus than the profile's.

    Shards are hashed when they are first seen; work/verified-<profile>.json remembers which files were intact.
    """
    return ActivationCache.open(
        stage.data / "cache",
        verify="sha256",
        remember=repository_root() / "work" / f"verified-{stage.profile}.json",
        model=recorded_fingerprint(stage.data / "model"),
        corpus=read_json(stage.data / "corpus" / "manifest.json")["fingerprint"],
    )
