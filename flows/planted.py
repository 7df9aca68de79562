"""Try the instruments where the answer is known: planted layers and small trained transformers."""

import subprocess

from crosshead.activations.machine import Machine
from crosshead.analysis.planted_suite import PlantedSuiteConfig, run_suite
from crosshead.io.files import write_json
from flows._runtime import Stage, main, repository_root


def planted(stage: Stage) -> None:
    """Plant, train, compare with the truth; a killed suite goes on at its first unfinished trial."""
    config = stage.section("planted", PlantedSuiteConfig)
    stage.section("machine", Machine).prepare()
    commit = _commit() if config.commit_seed else None
    with stage.work(stage.identity(("planted", "machine"), ())) as work:
        found = run_suite(config, work, commit)
        # A report, not data: it takes an hour and owes nothing to the model, so a clone has it and need not run it.
        write_json(stage.reports / "planted.json", found)


def _commit() -> str | None:
    """The commit that is checked out; None outside a repository."""
    command = ["git", "-C", str(repository_root()), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


if __name__ == "__main__":
    main(planted)
