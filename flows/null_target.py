"""Plant the null for superposition: a target that is known to have one head per feature, in the real activations."""

from crosshead.activations.batches import Batches
from crosshead.activations.cache import ActivationSource
from crosshead.activations.machine import Machine
from crosshead.analysis.evaluation import EvaluationConfig, evaluate
from crosshead.analysis.one_head import NullConfig, PlantedSource
from crosshead.dictionaries.base import Dictionary
from crosshead.dictionaries.registry import load_dictionary
from crosshead.io.files import atomic_directory, write_json
from crosshead.training.fit import TrainingConfig
from flows._inputs import open_cache
from flows._runtime import Stage, main


def null_target(stage: Stage) -> None:
    """Plant both splits, and measure how much of the real target the teacher explains and of the planted one can be."""
    config = stage.section("nulls", NullConfig)
    evaluation = stage.section("evaluation", EvaluationConfig)
    device = stage.section("machine", Machine).prepare()
    if config.teacher not in stage.sections["runs"]:
        raise ValueError(f"{stage.source}: nulls.teacher names {config.teacher!r}, which is not under runs; correct it")
    teacher = load_dictionary(stage.data / "runs" / config.teacher).to(device)
    teacher.engine = stage.section("training", TrainingConfig).engine
    cache = open_cache(stage, device)
    with atomic_directory(stage.data / "null_target") as directory:
        planted = PlantedSource(cache, teacher, directory)
        for split in ("train", "heldout"):
            planted.plant(split)
        write_json(directory / "target.json", {
            "teacher": config.teacher,
            "teacher_normalised_mse": _heldout_error(teacher, cache, evaluation, device),
            "noise_share": _heldout_error(teacher, planted, evaluation, device),
        })  # fmt: skip


def _heldout_error(teacher: Dictionary, source: ActivationSource, evaluation: EvaluationConfig, device: str) -> float:
    batches = Batches(source, "heldout", teacher.sites, evaluation.contexts_per_batch, 0, device=device)
    return evaluate(teacher, batches.all(), evaluation).normalised_mse


if __name__ == "__main__":
    main(null_target)
