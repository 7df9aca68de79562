"""Recompute one run of every kind without our cache, engine or evaluation code."""

from pathlib import Path

from crosshead.activations.corpus import Corpus
from crosshead.activations.machine import Machine
from crosshead.analysis.audit import Recomputed, audit_runs
from crosshead.dictionaries.base import read_description
from crosshead.io.files import atomic_directory, fingerprint, read_json, write_json
from flows._runtime import Stage, main

TOLERANCE = 1e-4


def audit(stage: Stage) -> None:
    """Compare recorded with recomputed normalised MSE; findings that differ are not published."""
    stage.section("machine", Machine).prepare()
    records = [read_json(stage.reports / "runs" / f"{run}.json") for run in stage.sections["runs"]]
    chosen = {}
    for record in records:
        if record["control"] == "none":
            chosen.setdefault(_kind(stage.data / "runs" / record["run"]), record)
    recomputed = audit_runs(
        {record["run"]: stage.data / "runs" / record["run"] for record in chosen.values()},
        stage.data / "model",
        Corpus.load(stage.data / "corpus").tokens("heldout"),
    )
    rows = [_row(record, recomputed[record["run"]]) for record in chosen.values()]
    for row in rows:
        if row["agrees"] is False:
            raise ValueError(
                f"run {row['run']} reports a normalised MSE of {row['normalised_mse']}, stock transformers give "
                f"{row['recomputed']}: they may differ by {TOLERANCE}; delete {stage.data}/runs/{row['run']} and run "
                "again, and if that changes nothing report a bug"
            )
    with atomic_directory(stage.data / "audit") as directory:
        write_json(directory / "audit.json", {"tolerance": TOLERANCE, "runs": rows})


def _kind(run: Path) -> str:
    """What makes a run's arithmetic its own - its configuration without sizes and starts; one of each is audited."""
    config = read_description(run)["config"]
    sizes = ("layers", "features", "sparsity")
    own = {name: value for name, value in config.items() if name not in sizes and not name.startswith("start")}
    return fingerprint(own | {"sparsity": config["sparsity"]["kind"]})


def _row(record: dict, recomputed: Recomputed) -> dict:
    found = recomputed.normalised_mse
    difference = None if found is None else abs(found - record["normalised_mse"])
    return {
        "run": record["run"],
        "architecture": record["architecture"],
        "heads_per_feature": record["heads_per_feature"],
        "target": record["target"],
        "sparsity": record["sparsity"]["kind"],
        "normalised_mse": record["normalised_mse"],
        "recomputed": found,
        "difference": difference,
        "agrees": None if difference is None else difference <= TOLERANCE,
        "reason": recomputed.reason,
    }


if __name__ == "__main__":
    main(audit)
