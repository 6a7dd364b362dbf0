"""Our runs beside quoted rows: what is quoted says so, what cannot be compared says so."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from clover.core.errors import CloverError
from clover.core.known import Count, KnownSet, known_sets
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


@pytest.mark.parametrize(
    ("told", "mark", "note"),
    [
        ("PathVQA test (6,761 questions), by its counts and its words", "this run", None),
        (
            "as many as PathVQA test (6,761 questions), but other words",
            "this run, other questions *",
            "by their counts or their words",
        ),
        (None, "this run, other questions *", "by their counts or their words"),
        (7, "this run, other questions *", "by their counts or their words"),
    ],
)
def test_the_set_is_the_one_that_the_scorer_recognised(
    told: object, mark: str, note: str | None, tmp_path: Path
) -> None:
    path = write_scores(tmp_path / "s.json")
    found = json.loads(path.read_text())
    found["llava-med"]["details"]["known_set"] = told
    path.write_text(json.dumps(found))
    (table,) = tables(read_ours(path), ["pathvqa"])
    assert table.rows[0][-1] == mark
    assert (note is None) == (not any("cannot be compared" in line for line in table.notes))
    assert note is None or note in table.notes[0]
    assert not any("words were not compared" in line for line in table.notes)


def test_a_set_told_by_its_counts_alone_says_so(tmp_path: Path) -> None:
    (table,) = tables(read_ours(write_scores(tmp_path / "old.json")), ["pathvqa"])
    assert table.notes[0].startswith("ours & co: taken for this set by the counts")
    quilt = write_scores(tmp_path / "quilt.json", closed=343, open_=940)
    (table,) = tables(read_ours(quilt), ["quilt-vqa"])
    assert table.rows[0][-1] == "this run"
    assert "words were not compared" in table.notes[0]


def test_every_set_of_the_table_is_a_known_one() -> None:
    names = [name for known in published()["sets"].values() for name in known["known"]]
    assert len(names) == 3
    assert set(names) <= {known.name for known in known_sets()}


def scored(path: Path, *arguments: str) -> Path:
    """Score a prediction file as a user would, and return the file of its scores."""
    out = path.with_suffix(".scores.json")
    done = CliRunner().invoke(score, [str(path), "--json", *arguments], catch_exceptions=False)
    out.write_text(done.stdout)
    return out


def test_a_rule_that_drops_items_does_not_make_other_questions_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.jsonl"
    rows = [
        {"id": n, "question": f"{n}?", "answer": answer, "prediction": "who knows"}
        for n, answer in enumerate(["yes", "no", "yes", "liver", "fat"])
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    count = Count()
    for row in rows:
        is_closed = row["answer"] in ("yes", "no")
        count.add(str(row["question"]), str(row["answer"]), is_closed=is_closed)
    name = "PathVQA test (6,761 questions)"
    known = KnownSet(name=name, open=2, closed=3, words=count.words)
    known_too = (known, *known_sets())  # with the others: the size of the largest is remembered
    monkeypatch.setattr("clover.core.known.known_sets", lambda: known_too)
    found = read_ours(scored(path, "--protocol", "llava-med-pvqa,pathvqa-official"))
    assert [run.scores["closed"].count for run in found] != [3, 3]
    (table,) = tables(found, ["pathvqa"])
    assert [row[-1] for row in table.rows[:2]] == ["this run", "this run"]
    assert not any("cannot be compared" in note for note in table.notes)


def test_trainable_parameters_come_through_the_score_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [
        {"id": n, "question": f"{n}?", "answer": answer, "prediction": answer}
        for n, answer in enumerate(["yes", "no", "liver"])
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    (table,) = tables(read_ours(scored(path, "--trainable", "187e6")), ["pathvqa"])
    assert table.rows[0][1] == "187.0"
    assert table.rows[0][-2] == "44.02 / 44.02"  # 100 / log10(187)


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
