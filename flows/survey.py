"""Score every head of every layer and choose the layers to study."""

from crosshead.activations.base_model import load_model
from crosshead.activations.corpus import Corpus
from crosshead.activations.machine import Machine
from crosshead.activations.survey import SurveyConfig
from crosshead.activations.survey import survey as score_heads
from flows._runtime import Stage, main


def survey(stage: Stage) -> None:
    """Survey the heads."""
    config = stage.section("survey", SurveyConfig)
    device = stage.section("machine", Machine).prepare()
    language_model = load_model(stage.data / "model", device=device)
    score_heads(language_model, Corpus.load(stage.data / "corpus"), config).save(stage.data / "survey")


if __name__ == "__main__":
    main(survey)
