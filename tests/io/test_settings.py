"""Reading parameter files and saying what is wrong with them."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from crosshead.io.settings import nearest, parse_section, read_sections


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Circle(Strict):
    kind: Literal["circle"] = "circle"
    radius: Annotated[float, Field(gt=0)]


class Square(Strict):
    kind: Literal["square"] = "square"
    side: float


class Drawing(Strict):
    shape: Annotated[Circle | Square, Field(discriminator="kind")]
    parts: tuple[Circle, ...] = ()
    width: int = 1
    height: int = 1

    @model_validator(mode="after")
    def _wide(self) -> "Drawing":
        if self.height > self.width:
            raise ValueError(f"height={self.height} exceeds width={self.width}; lower it")
        return self


def fault(value: object) -> str:
    with pytest.raises(ValueError, match=r"^p\.yaml: drawing") as caught:
        parse_section(Drawing, value, "drawing", "p.yaml")
    return str(caught.value)


CIRCLE = {"kind": "circle", "radius": 1}


def test_a_valid_section_is_returned():
    assert parse_section(Drawing, {"shape": CIRCLE}, "drawing", "p.yaml").shape == Circle(radius=1)


def test_keys_inside_a_union_are_named_without_the_member():
    assert fault({"shape": {"kind": "circle", "radius": -1}}) == (
        "p.yaml: drawing.shape.radius = -1: input should be greater than 0"
    )


def test_a_misspelt_key_inside_a_union_gets_that_place_s_names():
    message = fault({"shape": {"kind": "circle", "radius": 1, "radios": 2}})
    assert message.startswith("p.yaml: drawing.shape.radios is not a parameter (got 2); did you mean 'radius'?")


def test_entries_of_a_list_are_named_by_place():
    assert "drawing.parts.1.radius is missing; add it" in fault({"shape": CIRCLE, "parts": [CIRCLE, {}]})


def test_a_config_s_own_message_is_kept():
    assert fault({"shape": CIRCLE, "height": 3}) == "p.yaml: drawing: height=3 exceeds width=1; lower it"


def test_a_section_that_is_no_mapping_is_refused():
    assert "drawing = 3: input should be a valid dictionary" in fault(3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": True}, "drawing.width = True: input should be a number"),
        ({"shape": {"kind": "circle", "radius": float("inf")}}, "drawing.shape.radius = inf: input should be a finite"),
        ({"shape": {"kind": "circle", "radius": True}}, "drawing.shape.radius = True: input should be a number"),
        ({"parts": [CIRCLE, {"radius": ".inf"}]}, "drawing.parts.1.radius = '.inf': input should be a valid number"),
        ({"parts": [CIRCLE, {"radius": "inf"}]}, "drawing.parts.1.radius = 'inf': input should be a finite number"),
    ],
)
def test_booleans_and_infinities_are_no_numbers(changes: dict, said: str):
    assert said in fault({"shape": CIRCLE} | changes)


def test_nearest_suggests_or_lists():
    assert nearest("stepz", ["steps", "seed"]).startswith("did you mean 'steps'?")
    assert nearest("zzz", ["steps", "seed"]) == "choose one of: steps, seed"


@pytest.mark.parametrize(
    ("text", "said"), [("a: [1", "is not valid YAML"), ("- 1\n- 2\n", "holds list, expected sections")]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, said: str):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_sections(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none.yaml does not exist; run from the repository root"):
        read_sections(tmp_path / "none.yaml")
