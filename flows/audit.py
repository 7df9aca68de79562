"""Recompute one run of every architecture without our cache, engine or evaluation code."""

from crosshead.activations.corpus import Corpus
from crosshead.activations.machine import Machine
from crosshead.analysis.audit import audit_runs
from crosshead.io.files import atomic_directory, read_json, write_json
from flows._runtime import Stage, main

TOLERANCE = 1e-4


def audit(stage: Stage) -> None:
    """Compare recorded with recomputed normalised MSE."""
    stage.section("machine", Machine).prepare()
    records = [read_json(stage.reports / "runs" / f"{run}.json") for run in stage.sections["runs"]]
    chosen = {}
    for record in records:
        if record["control"] == "none":
            chosen.setdefault(record["architecture"], record)
    recomputed = audit_runs(
        {record["run"]: stage.data / "runs" / record["run"] for record in chosen.values()},
        stage.data / "model",
        Corpus.load(stage.data / "corpus").tokens("heldout"),
    )
    rows = [_row(record, recomputed[record["run"]]) for record in chosen.values()]
    with atomic_directory(stage.data / "audit") as directory:
        write_json(directory / "audit.json", {"tolerance": TOLERANCE, "runs": rows})


def _row(record: dict, recomputed: float) -> dict:
    difference = abs(recomputed - record["normalised_mse"])
    return {
        "run": record["run"],
        "architecture": record["architecture"],
        "normalised_mse": record["normalised_mse"],
        "recomputed": recomputed,
        "difference": difference,
        "agrees": difference <= TOLERANCE,
    }


if __name__ == "__main__":
    main(audit)
