"""Tables and figures of QK features and replacement layers: what is shown, and what is left out."""

from copy import deepcopy

import pytest
from matplotlib.figure import Figure

from crosshead.reporting import attention_figures
from crosshead.reporting.attention import attention_sections
from tests.analysis.records import attention_evidence


def rows_of(table: str) -> list[dict[str, str]]:
    """A Markdown table, by the titles of its columns."""
    titles, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(titles, line, strict=True)) for line in lines]


def test_rank_of_qk_is_blank_where_it_is_a_parameter():
    metrics = attention_evidence()
    metrics["attention"][-1]["config"] = {"variant": {"kind": "combined", "qk_active": 2}, "head_dim": 4}
    wide, combined = rows_of(attention_sections(metrics)["layers"])
    assert (wide["rank of QK"], combined["variant"], combined["rank of QK"]) == ("2.0", "combined", "")
    assert combined["rank of OV"] == "2.0"


def test_every_recorded_relation_of_an_induction_feature_is_shown():
    metrics = attention_evidence()
    [before] = rows_of(attention_sections(metrics)["induction"])
    assert before["same token"] == "90%"
    assert "else same class" not in before
    [feature] = metrics["explain"]["induction"][0]["features"]
    feature["alike"] = {"token": 0.05, "word": 0.01, "substring": 0.02, "word class": 0.4, "none": 0.52}
    [after] = rows_of(attention_sections(metrics)["induction"])
    shown = {"same token": "5%", "else same word": "1%", "else three letters": "2%", "else same class": "40%"}
    assert {title: after[title] for title in shown} == shown
    assert after["not alike"] == "52%"


def test_the_lift_of_a_skip_trigram_is_shown_where_it_is_recorded():
    metrics = attention_evidence()
    assert "lift" not in rows_of(attention_sections(metrics)["trigrams"])[0]
    metrics["replacements"]["heads"][0]["skip_trigrams"]["triples"][0]["lift"] = 6.25
    [row] = rows_of(attention_sections(metrics)["trigrams"])
    assert (row["lift"], row["confirmed"]) == ("6.2", "yes")


def test_the_report_tells_the_two_predictions_of_a_deletion_apart():
    metrics = attention_evidence()
    [decision] = metrics["explain"]["decisions"]
    assert "predicted fall" not in attention_sections(metrics)["decisions"][0]["keys_table"]
    decision["predicted_from_features_alone"] = {
        "attention_after": 0.25, "fall": 0.1, "model_fall": 0.3, "distance": 0.2, "distance_before": 0.125,
        "model_distance": 0.4,
    }  # fmt: skip
    decision["strongest_keys"][0] |= {"attention_after": 0.1, "predicted_after": 0.25}
    keys, deletion = map(rows_of, attention_sections(metrics)["decisions"][0]["keys_table"].split("\n\n"))
    assert keys[0]["after it, predicted from features alone"] == "25.0%"
    alone, same = deletion
    how = "deletion of the pairs, predicted"
    assert (alone[how], alone["predicted fall"]) == ("from features alone", "10.0%")
    assert same[how].startswith("by the same arithmetic")
    assert same["predicted fall"] == same["attention on the key falls by"] == "30.0%"
    assert (alone["distance of the patterns after it"], same["distance of the patterns after it"]) == ("0.2", "")


@pytest.fixture
def drawn(monkeypatch, tmp_path) -> dict[str, list[tuple[float, float]]]:
    """Points of every panel of the description lengths, by title; four kinds of runs."""
    metrics, found = deepcopy(attention_evidence()), {}
    [length] = metrics["replacements"]["description_lengths"]
    runs = (("arl-wide-30", "replacement", 900.0), ("arl-narrow-9", "replacement", 500.0), ("mtc", "mtc", 300.0),
            ("sae", "attn_out_sae", 100.0))  # fmt: skip
    metrics["replacements"]["description_lengths"] = [
        length | {"run": run, "architecture": kind, "bits": bits, "bits_activations": bits / 2}
        for run, kind, bits in runs
    ]
    metrics["attention"][-1]["config"] = {"variant": {"kind": "combined"}, "head_dim": 4}

    def keep(figure: Figure, path) -> None:
        """Instead of writing it."""
        if path.name == "description_length.png":
            assert "within one panel only" in figure.get_suptitle()
            found.update({axes.get_title(): [tuple(float(x[0]) for x in line.get_data()) for line in axes.get_lines()]
                          for axes in figure.axes})  # fmt: skip

    monkeypatch.setattr(attention_figures, "save", keep)
    attention_figures.draw_attention(metrics, tmp_path)
    return found


def test_bits_with_positions_are_drawn_beside_bits_of_the_same_kind_only(drawn):
    assert drawn == {
        "Activations alone: all compare": [(450.0, 0.4), (250.0, 0.4), (150.0, 0.4), (50.0, 0.4)],
        "With positions: replacement layers": [(900.0, 0.4)],
        "With positions: combined layers": [(500.0, 0.4)],
        "With positions: transcoders": [(300.0, 0.4)],
    }
