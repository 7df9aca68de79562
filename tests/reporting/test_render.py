import re

import pytest

from crosshead.analysis.findings import SCHEMA, ReportConfig, collect
from crosshead.analysis.verdicts import judge
from crosshead.reporting.page import render_html
from crosshead.reporting.render import anchor, render_markdown
from flows.report import draw
from tests.analysis.records import attention_evidence, documents, evidence, record

CONFIG = ReportConfig()


@pytest.fixture(scope="module", params=[(0,), (0, 1, 2)], ids=["one-seed", "three-seeds"])
def report(request, tmp_path_factory):
    inputs = {"gpu": {"schema": SCHEMA, "profile": "gpu", "frontier": [], "comparisons": {}}}
    made = documents(request.param)
    made["records"] += [record(series, l0, 5 / l0, seed) for seed in request.param[1:] for l0 in (30, 110)
                        for series in ("mtc-penalty-l1", "mtc-nonnegative", "heads4", "mtc-settings")]  # fmt: skip
    metrics = collect(**made, **evidence(), **attention_evidence(), profile="test", config=CONFIG, inputs=inputs)
    directory = tmp_path_factory.mktemp("figures")
    draw(metrics, made["records"], made["clusters"], CONFIG, directory)
    markdown = render_markdown(metrics, judge(metrics, CONFIG))
    return metrics, markdown, render_html(markdown, directory), directory


def test_the_page_needs_nothing_outside_itself(report):
    page = report[2]
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', page)
    assert "<script" not in page


def test_every_picture_of_the_markdown_is_in_the_page(report):
    _, markdown, page, directory = report
    pictures = re.findall(r"figures/([\w.-]+\.png)", markdown)
    assert {p.name for p in directory.iterdir()} == set(pictures)
    assert page.count("<img ") == len(pictures)


def test_clusters_by_density_and_examples_stand_beside_their_rivals(report):
    metrics, markdown, _, _ = report
    assert "| mtc-30 | 3 | 40% | 4 | 0.50 |" in markdown
    labels = [line.split("|")[1].strip() for line in markdown.split("Examples for reading")[1].splitlines()[4:]
              if line.startswith("|")]  # fmt: skip
    shown = list(dict.fromkeys(e["label"] for run in metrics["meaning"]["runs"].values() for e in run["examples"]))
    seen = [label for label in labels if label in shown]
    assert seen == sorted(seen, key=list(dict.fromkeys(seen)).index), "a label's rows stand together"


def test_cells_of_a_table_break_where_they_are_long(tmp_path):
    rows = "| a | b |\n|---|---|\n| " + "x" * 40 + " | " + "y" * 41 + " |"
    page = render_html(f"# T\n\n{rows}", tmp_path)
    assert f'<td class="text">{"x" * 40}</td><td class="text long">{"y" * 41}</td>' in page


def test_matched_features_stand_side_by_side(report):
    assert "| top1-60 | mtc-60 | 100 / 90 | 40 | 0.85 | 4.00 / 5.00 | 1.20, 1.10 to 1.30 |" in report[1]
    assert "| 3 / 7 | 0.90 | 4.00 / 5.00 | 2.00 / 2.50 | `a / b` | `c` |" in report[1]


def test_every_run_and_verdict_is_shown(report):
    metrics, markdown, page, _ = report
    for row in metrics["frontier"]:
        assert f"| {row['run']} |" in markdown
    for finding in judge(metrics, CONFIG):
        assert finding.claim in markdown
    assert page.count('class="verdict inconclusive"') == 2 * len(judge(metrics, CONFIG))


def test_the_table_of_verdicts_comes_first_and_leads_to_every_claim(report):
    metrics, markdown, page, _ = report
    assert markdown.index("## Verdicts") < markdown.index("## Findings")
    for finding in judge(metrics, CONFIG):
        assert f'<a href="#{anchor(finding.title)}">{finding.title}</a>' in page
        assert f'<h3 id="{anchor(finding.title)}">' in page


def test_corpus_text_stays_one_cell(report):
    assert "`a / b [c] 'd' e`" in report[1]
    assert "<code>a / b [c] 'd' e</code>" in report[2]


def test_attention_runs_induction_features_decisions_and_replacement_heads_are_shown(report):
    metrics, markdown, page, _ = report
    for row in metrics["attention"]:
        assert f"| {row['run']} |" in markdown
        assert "head_counts" not in row["evaluation"]
    assert "word `a/b` (80%): `a`" in markdown
    assert "One attention decision explained: `a` attends to `\\n`" in markdown
    assert "| arl-wide-30 | 5 | `b` | `a` | `c` | 0.500 |" in markdown
    assert "permuted pairs" in page.lower()


def test_a_profile_without_attention_runs_has_no_such_sections():
    metrics = collect(**documents(), **evidence(), profile="test", config=CONFIG, inputs={})
    markdown = render_markdown(metrics, judge(metrics, CONFIG))
    assert "QK features" not in markdown
    assert "replacement layers" not in markdown


def test_the_quantised_weights_are_named(report):
    assert "4-bit weights." in report[1]


def test_numbers_align_right_and_words_left(report):
    page = report[2]
    assert '<th class="number">normalised MSE</th>' in page
    assert '<th class="text">run</th>' in page


def test_labelled_inputs_have_their_own_section(report):
    assert "## Labelled input: gpu" in report[1]


def test_text_is_escaped(tmp_path):
    assert "&lt;b&gt;" in render_html("# a <b> title\n\nwords", tmp_path)


def test_equal_numbers_give_equal_bytes(report, tmp_path):
    metrics, _, _, directory = report
    made = documents()
    draw(metrics, made["records"], made["clusters"], CONFIG, tmp_path)
    for path in directory.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
