"""What every dictionary does before its architecture matters: checks of layers, and of files that it loads."""

import json
from pathlib import Path

import pytest
import torch

from crosshead.dictionaries.registry import build, config_class, load_dictionary
from crosshead.io.tensors import load_tensors, save_tensors
from tests.dictionaries.cases import CASES, DIMS, config_of


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build(config_of("value_sae-two/topk"), DIMS).save(tmp_path / "run")
    return tmp_path / "run"


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=r"(dictionary\.json|weights\.safetensors)") as caught:
        load_dictionary(path)
    return str(caught.value)


@pytest.mark.parametrize("case", ["mtc/topk", "value_sae-one/topk", "attn_out_sae/topk"])
def test_a_layer_that_the_model_has_not_is_refused(case: str):
    config = config_class(CASES[case]["kind"]).model_validate(CASES[case] | {"layers": [40]})
    with pytest.raises(ValueError, match="layer 40 is out of range; the model has layers 0 to 5; correct layers"):
        build(config, DIMS)


@pytest.mark.parametrize("layers", [[4, 2], [2, 2], [-1, 2]])
def test_layers_are_distinct_and_ascend_from_0(layers: list[int]):
    with pytest.raises(ValueError, match="give numbers from 0 on, lowest first, each once"):
        config_class("value_sae").model_validate(CASES["value_sae-two/topk"] | {"layers": layers})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda description: description.pop("config"), "does not hold format, config and dims; train the run again"),
        (lambda description: description.pop("dims"), "does not hold format, config and dims"),
        (lambda description: description.pop("format"), "does not hold format, config and dims"),
        (lambda description: description.update(format=2), "has format 2, this version reads 1; train the run again"),
        (
            lambda description: description.update(config=3),
            "names the architecture None, this version has attn_out_sae",
        ),
        (lambda description: description["config"].pop("kind"), "names the architecture None"),
        (lambda description: description["config"].update(kind="clt"), "names the architecture 'clt'"),
        (lambda description: description["config"].pop("features"), "config.features is missing"),
        (lambda description: description["dims"].update(d_model=0), "dims.d_model = 0: input should be greater than 0"),
    ],
)
def test_a_description_that_cannot_be_read_is_one_sentence(change, said: str, saved: Path):
    description = json.loads((saved / "dictionary.json").read_text())
    change(description)
    (saved / "dictionary.json").write_text(json.dumps(description))
    message = refused(saved)
    assert said in message
    assert len(message.splitlines()) == 1


def test_a_description_that_is_no_mapping_is_refused(saved: Path):
    (saved / "dictionary.json").write_text("[1]")
    assert "does not hold format, config and dims" in refused(saved)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("decoder"), "Missing key"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "Unexpected key"),
        (lambda tensors: tensors.update(decoder=torch.zeros(3, 3)), "size mismatch for decoder"),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence(change, said: str, saved: Path):
    tensors = load_tensors(saved / "weights.safetensors", "")
    change(tensors)
    save_tensors(saved / "weights.safetensors", tensors)
    message = refused(saved)
    assert said in message
    assert message.endswith("train the run again")
    assert len(message.splitlines()) == 1
