"""Say what the features and clusters of some trained dictionaries mean."""

import torch

from crosshead.activations.base_model import load_model
from crosshead.activations.machine import Machine
from crosshead.activations.survey import Survey
from crosshead.analysis.meaning import MeaningConfig, Subject, describe
from crosshead.dictionaries.registry import load_dictionary
from crosshead.io.files import atomic_directory, read_json, write_json
from flows._inputs import open_cache
from flows._runtime import Stage, main


def meaning(stage: Stage) -> None:
    """Describe every run that ``meaning.runs`` and ``meaning.settings`` name."""
    config = stage.section("meaning", MeaningConfig)
    device = stage.section("machine", Machine).prepare()
    subjects = [_subject(stage, run, device) for run in (*config.runs, *config.settings)]
    model = load_model(stage.data / "model", device=device)
    survey = Survey.load(stage.data / "survey")
    found = describe(subjects, open_cache(stage, device), model, survey.heads, config)
    with atomic_directory(stage.data / "meaning") as directory:
        write_json(directory / "meaning.json", found)


def _subject(stage: Stage, run: str, device: str) -> Subject:
    if run not in stage.sections["runs"]:
        raise ValueError(f"{stage.source}: meaning names {run!r}, which is not under runs; correct it")
    directory = stage.data / "runs" / run
    module = load_dictionary(directory).to(device)
    live = torch.tensor(read_json(directory / "feature_counts.json")) > 0
    return Subject(run, module, live.numpy())


if __name__ == "__main__":
    main(meaning)
