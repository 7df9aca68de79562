"""List what a training of each architecture runs, with a digest of every file.

A training depends on the list of its architecture instead of on sixty files: DVC writes dvc.lock anew after every
stage, and with hundreds of trainings the lists in it took longer than some trainings.
"""

from crosshead.io.files import atomic_directory, sha256_file, write_json
from flows._closure import ROOT, TRAININGS, import_graph, training_closure
from flows._runtime import Stage, main


def code(stage: Stage) -> None:
    """Write one list per architecture: path of each file its training imports, and the SHA-256 of its bytes."""
    graph = import_graph()
    with atomic_directory(stage.data / "code") as directory:
        for kind in TRAININGS:
            digests = {path: sha256_file(ROOT / path) for path in training_closure(kind, graph)}
            write_json(directory / f"{kind}.json", digests)


if __name__ == "__main__":
    main(code)
