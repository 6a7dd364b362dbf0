"""`clover ask`: one answer, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clover import load
from clover.cli import main
from tiny import QUESTION, Tiny


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_the_answer_goes_to_stdout_and_the_notice_to_stderr(
    tiny: Tiny, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tiny.image()
    code, out, err = run(["ask", str(tiny_model), str(image), QUESTION], capsys)
    assert code == 0
    assert out.strip() == load(tiny_model).ask(image, QUESTION).text != ""
    assert err.count("not for diagnosis") == 1 and "not for diagnosis" not in out


def test_json_is_one_line_with_answer_model_seconds_and_notice(
    tiny: Tiny, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(["ask", str(tiny_model), str(tiny.image()), QUESTION, "--json"], capsys)
    row = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert set(row) == {"answer", "model", "seconds", "notice"}
    assert row["model"] == "tiny" and row["seconds"] > 0 and "not for diagnosis" in row["notice"]


def test_max_tokens_shortens_and_beams_are_taken(
    tiny: Tiny, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["ask", str(tiny_model), str(tiny.image()), QUESTION]
    _, out, _ = run([*start, "--max-tokens", "1"], capsys)
    assert len(out.split()) <= 1
    code, out, _ = run([*start, "--beams", "3"], capsys)
    assert code == 0 and out.strip()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no image", "no image"),
        ("truncated", "cannot be read as an image"),
        ("text", "cannot be read as an image"),
        ("empty question", "the question is empty"),
        ("no model", "is not a model folder"),
        ("a file as model", "is not a model folder"),
    ],
)
def test_every_mistake_is_one_line_and_exit_code_2(
    tiny: Tiny,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
    words: str,
) -> None:
    model, image, question = tiny_model, tiny.image(), QUESTION
    broken = tmp_path / "broken.png"
    if damage == "no image":
        image = broken
    elif damage == "truncated":
        broken.write_bytes(image.read_bytes()[:-400])
        image = broken
    elif damage == "text":
        broken.write_text("not an image")
        image = broken
    elif damage == "empty question":
        question = "  "
    elif damage == "no model":
        model = tmp_path
    else:
        model = image
    code, out, err = run(["ask", str(model), str(image), question], capsys)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and words in err
