"""Fetch the base model and write it in hub layout."""

from crosshead.activations.base_model import ModelConfig, prepare_model
from flows._runtime import Stage, main


def model(stage: Stage) -> None:
    """Fetch the base model."""
    config = stage.section("model", ModelConfig)
    with stage.work(stage.identity(("model",), ())) as work:
        prepare_model(config, stage.data / "model", work=work)


if __name__ == "__main__":
    main(model)
