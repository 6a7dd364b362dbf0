"""The page of a run: what stands on it, what must never, and folders with holes."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from clover.core.errors import CloverError
from clover.report.command import report
from clover.report.page import write_comparison, write_report

PARTS = [
    "recipe.yaml",
    "metrics.jsonl",
    "costs.json",
    "align.scores.json",
    "scores.json",
    "evaluation",
    "model",
    "instructions",
    "phantom-validation",
]


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    void = frozenset({"meta", "img", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def test_a_whole_run_shows_every_section_and_its_figures(run: Path) -> None:
    page = read(write_report(run))
    assert not page.open, "every tag is closed"
    for heading in (
        "Does it look at the image?",
        "Question forms",
        "Stage 1: align",
        "visual tokens spell the answer",
        "200 steps, loss 0.95 to 0.21",
        "a projection fitted to 81.2 % of the words' variance",
        "Stage 2: tune",
        "Where they come from",
        "Turned away by the filter",
        "Examples",
        "Where time and money went",
        "recipe.yaml, as it was run",
    ):
        assert heading in page.text
    for figure in (
        "clover-phantom",
        "91.4",
        "88.4 to 94.4",
        "93.84",
        "86.2",
        "+41.3",
        "36.3 to 46.3",
        "+54.8",
        "9.41 M",
        "9 min 34 s",
        "$0.0042",
        "41.7 %",
        "79.3",
        "3.37",
        "The model looks",
        "least even form: is ",
        "tf_efficientnet_lite0 (Apache-2.0)",
        "answer not in the caption",
    ):
        assert figure in page.text
    assert "is not in this folder" not in page.text
    assert page.text.count("Research use only, not for diagnosis") == 2


def test_the_page_loads_nothing_and_runs_nothing(run: Path) -> None:
    path = write_report(run)
    text = path.read_text(encoding="utf-8")
    assert path == run / "report.html"
    assert not re.search(r"https?://", text)
    page = Reader(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        if "src" in attributes:
            assert (attributes["src"] or "").startswith("data:image/jpeg;base64,"), tag
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in text and "@import" not in text


def test_what_a_model_says_is_text_and_never_markup(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_names_in_charts_are_escaped_too(run: Path) -> None:
    bad = {"source": "g", "line": 1, "reason": '"><script>x</script>', "content": "<b>no</b>"}
    path = run / "instructions" / "generated.rejected.jsonl"
    path.write_text(json.dumps(bad) + "\n", encoding="utf-8")
    text = write_report(run).read_text(encoding="utf-8")
    assert "<script" not in text and "<b>no" not in text


def test_pictures_are_few_and_small(run: Path) -> None:
    page = read(write_report(run))
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert 8 < len(sources) <= 16
    assert all(len(base64.b64decode(source.split(",")[1])) <= 20_000 for source in sources)


def test_examples_are_right_and_wrong_ones_of_every_form_with_the_blind_answer(run: Path) -> None:
    page = read(write_report(run))
    kinds = [a["class"] for tag, a in page.tags if tag == "article"]
    assert kinds.count("card right") == 8
    assert kinds.count("card wrong") + kinds.count("card part") == 8
    assert "1 of 2 words" in page.text, "half of 'colonic mucosa' was said"
    for form in ("tissue", "stain", "is necrosis", "is mitosis"):
        assert page.text.count(f" {form} ") >= 2
    assert page.text.count("blind") > 16


def test_charts_can_be_read_without_seeing_them(run: Path) -> None:
    page = read(write_report(run))
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 11
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    labels = " ".join(chart["aria-label"] or "" for chart in charts)
    assert "without an image 50.1" in labels
    assert "commonest answer (exact) 22.5" in labels
    assert "linear probe 88.8" in labels


@pytest.mark.parametrize("part", PARTS)
def test_one_missing_part_is_named_and_the_rest_is_shown(run: Path, part: str) -> None:
    target = run / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    page = read(write_report(run))
    if part == "model":
        assert "CLOVER: made-up" in page.text, "the recipe's name stands in"
    elif part == "phantom-validation":
        assert "16 pictures were not found" in page.text
    else:
        assert part in page.text.replace("evaluation/predictions.jsonl", "evaluation")
        assert "not in this folder" in page.text
    if part != "scores.json":
        assert "91.4" in page.text


def test_a_run_that_has_only_begun_is_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: begun\n")
    page = read(write_report(tmp_path))
    assert "CLOVER: begun" in page.text
    assert page.text.count("not in this folder") == 6
    assert not [a for tag, a in page.tags if a.get("class") == "tile"], "no tile without a figure"


def test_damaged_files_are_named_and_good_lines_kept(run: Path) -> None:
    (run / "costs.json").write_text('{"total": ')
    with (run / "evaluation" / "predictions.jsonl").open("a") as out:
        out.write('{"id": "torn", "question": "Wh\n[1, 2]\n')
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"stage": "tune", "step": 310, "loss": NaN}\n')
    (run / "phantom-validation" / "images" / "00000.png").write_bytes(b"no picture")
    page = read(write_report(run))
    assert "costs.json is not JSON" in page.text
    assert "predictions.jsonl: 2 damaged lines were passed over" in page.text
    assert "nan" not in page.text.lower()


def test_odd_values_in_scores_are_dashes(run: Path) -> None:
    scores = json.loads((run / "scores.json").read_text())
    scores.update(closed=None, image_gain_closed=None, num_closed=0)
    scores["details"]["views"]["image"]["closed"] = {"value": None, "low": None, "n": 0}
    scores["details"]["gains"] = {}
    scores["details"]["forms"] = {"odd (closed)": {"type": "closed"}, "none": None}
    (run / "scores.json").write_text(json.dumps(scores))
    assert "– / +54.8" in read(write_report(run)).text


def test_several_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "demo"
    shutil.copytree(run, other)
    scores = json.loads((other / "scores.json").read_text())
    scores["details"]["views"]["image"]["closed"]["value"] = 77.77
    (other / "scores.json").write_text(json.dumps(scores))
    page = read(write_comparison([run, other], tmp_path / "both.html"))
    table = page.text.split("Small figures")[0]
    assert "91.4" in table and "77.8" in table
    assert "2 runs compared" in table
    names = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(names) == len(set(names)) and {"run1", "run2"} <= set(names)


def test_the_verb_writes_where_it_is_told(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    result = CliRunner().invoke(report, [str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.exists() and str(out) in result.output
    assert not (run / "report.html").exists()


def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CloverError, match=r"no run folder .*nowhere.*clover demo"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(CloverError, match=r"holds nothing of a run.*scores\.json"):
        write_report(tmp_path)


def test_a_charge_against_the_model_stands_beside_the_verdict(run: Path) -> None:
    scores = json.loads((run / "scores.json").read_text())
    sentence = "blind: right in 42.1% of 955 questions <b>"
    scores["details"]["exposed"] = {"charges": [{"name": "blind", "sentence": sentence}, {}, 3]}
    (run / "scores.json").write_text(json.dumps(scores))
    page = read(write_report(run))
    assert f"Exposed as {sentence}." in page.text
    assert [tag for tag, found in page.tags if found.get("class") == "exposed"] == ["p"]
    scores["details"]["exposed"] = "nothing"
    (run / "scores.json").write_text(json.dumps(scores))
    assert "Exposed as" not in read(write_report(run)).text
