"""Our runs beside quoted rows: what is quoted says so, what cannot be compared says so."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from clover.core.errors import CloverError
from clover.evaluate.command import score
from clover.report.command import report
from clover.report.figure import Figure
from clover.report.published import Ours, published, read_ours, tables


def figure(value: float, n: int) -> dict[str, float]:
    return {"value": value, "n": n, "low": value - 1, "high": value + 1}


def write_scores(path: Path, *, closed: int = 3391, open_: int = 3370) -> Path:
    scores = {key: figure(40.0, open_) for key in ("open_recall", "open_precision", "open_f1")}
    details = {"header": {"model": "ours & co"}}
    found = {"llava-med": {"closed": figure(90.0, closed), **scores, "details": details}}
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def test_quoted_rows_have_a_source_and_say_that_they_are_quoted() -> None:
    data = published()
    rows = [row for known in data["sets"].values() for row in known["rows"]]
    assert len(rows) == 10
    for row in rows:
        assert row["quoted"] is True
        assert data["sources"][row["source"]]["differs"]


def test_the_papers_figures_are_those_of_the_paper() -> None:
    (table, quilt) = tables([])
    lines = {row[0]: row[1:] for row in table.rows}
    assert lines["CLOVER"][:5] == ["187", "llava-med", "89.38", "36.95", "39.34 / 16.26"]
    assert lines["LLaVA-Med"][2:4] == ["91.21", "37.95"]
    assert lines["LLaVA"][4].startswith("16.41")  # as printed: 63.20 / log10(7,100)
    assert quilt.rows[0][4:7] == ["54.33", "40.74", "43.56"]


def test_a_run_on_the_same_questions_is_told_from_one_on_others(tmp_path: Path) -> None:
    same = read_ours(write_scores(tmp_path / "same.json"))
    (found,) = tables(same, ["pathvqa"])
    assert found.rows[0][-1] == "this run"
    assert not any("cannot be compared" in note for note in found.notes)
    other = read_ours(write_scores(tmp_path / "other.json", closed=10))
    (found,) = tables(other, ["pathvqa"])
    assert found.rows[0][-1] == "this run, other questions *"
    assert "cannot be compared" in found.notes[0]


def test_another_rule_than_the_quoted_one_is_said() -> None:
    (found,) = tables([Ours("m", "strict", 19.0, _figures())], ["quilt-vqa"])
    assert any(note.startswith("strict: not the quoted rows' rule") for note in found.notes)


def _figures() -> dict[str, Figure]:
    return {key: Figure(1.0) for key in ("closed", "open_recall", "open_precision", "open_f1")}


def table(*arguments: str | Path) -> str:
    done = CliRunner().invoke(report, ["--table", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_prints_each_form(whole_run: Path, tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "s.json")
    text = table(whole_run, scores)
    assert "91.37 [88.4, 94.4]" in text
    assert "ours & co" in text
    assert "quoted [a]" in text
    assert "not for diagnosis" in text
    latex = table(scores, "--format", "latex")
    assert r"ours \& co & -- & llava-med & 90.00 [89.0, 91.0]" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    out = tmp_path / "table.html"
    table(scores, "--format", "html", "--out", out)
    page = out.read_text("utf-8")
    assert "ours &amp; co" in page
    assert "http" not in page
    HTMLParser().feed(page)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[1]", "no scores by protocol"), (None, "no run folder or score file")],
)
def test_what_is_no_score_file_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CloverError, match=message):
        read_ours(path)


def test_an_unknown_set_is_named_with_its_neighbour() -> None:
    with pytest.raises(CloverError, match="no test set 'pathvq'; did you mean 'pathvqa'"):
        tables([], ["pathvq"])


def test_who_does_not_look_is_named_beside_the_scores(tmp_path: Path) -> None:
    """The files are made as a user would: predictions, scored by the command, laid in a table."""
    truths = ["yes", "no"] * 30
    rows = [
        {"id": at, "image": f"{at}.png", "question": "Is it malignant?", "answer": truth}
        for at, truth in enumerate(truths)
    ]
    said = {"yes-sayer": "Yes.", "looks": None}
    files = []
    for name, answer in said.items():
        path = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({**row, "prediction": answer or row["answer"]}) for row in rows]
        path.write_text("\n".join(lines))
        protocols = ["--protocol", "strict,quilt"]
        done = CliRunner().invoke(score, [str(path), "--json", *protocols], catch_exceptions=False)
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(done.stdout)
    charge = "yes-sayer is exposed as yes-sayer: says yes to 100.0% of the 30 closed questions"
    text = " ".join(table(*files, "--set", "pathvqa").split())
    assert text.count(f"† {charge} whose truth is no") == 1  # once, for two protocols
    assert "yes-sayer † – strict" in text
    assert "looks – strict" in text
    assert "looks is exposed" not in text
    latex = table(*files, "--format", "latex", "--set", "pathvqa")
    assert rf"\dag{{}} {charge}".replace("%", r"\%") in latex
    table(*files, "--format", "html", "--out", tmp_path / "t.html")
    assert f'<p class="exposed">† {charge}' in (tmp_path / "t.html").read_text("utf-8")
