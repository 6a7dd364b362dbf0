"""`clover chat`: a conversation over a pipe, as a script or a test drives it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.slides.conftest import halved, write_pyramid

from clover import load
from clover.cli import main
from clover.serve.chat import Conversation
from tiny import QUESTION, Tiny


def talk(
    arguments: list[str],
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    with pytest.raises(SystemExit) as stop:
        main(["chat", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_the_first_answer_is_what_ask_answers(
    tiny: Tiny, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, out, err = talk(
        [str(tiny_model), str(tiny.image())], [QUESTION, "", "  "], monkeypatch, capsys
    )
    assert code == 0
    assert out.strip() == load(tiny_model).ask(tiny.image(), QUESTION).text
    assert err.count("not for diagnosis") == 1


def test_a_saved_conversation_holds_every_turn_and_new_forgets_them(
    tiny: Tiny, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    lines = [QUESTION, "", "is this liver ?", f"/save {first}", "/new", QUESTION, f"/save {second}"]
    code, _, _ = talk([str(tiny_model), str(tiny.image())], lines, monkeypatch, capsys)
    assert code == 0
    long, short = (json.loads(path.read_text()) for path in (first, second))
    assert [turn["question"] for turn in long["turns"]] == [QUESTION, "is this liver ?"]
    assert len(short["turns"]) == 1 and short["turns"][0]["answer"] == long["turns"][0]["answer"]
    assert long["image"] == str(tiny.image()) and "not for diagnosis" in long["notice"]


def test_why_writes_where_the_model_looked(
    tiny: Tiny, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from PIL import Image

    path = tmp_path / "why.png"
    lines = ["/why", QUESTION, f"/why {path}", "/why picture.txt"]
    code, out, err = talk([str(tiny_model), str(tiny.image())], lines, monkeypatch, capsys)
    assert code == 0
    assert Image.open(path).size == Image.open(tiny.image()).size
    assert f"{path}: where the model looked when asked '{QUESTION}'" in out
    assert "Deletion test: " in out
    assert "/why wants a question first" in err
    assert "/why writes a PNG; name it for instance picture.png" in err


def test_mistakes_are_one_line_each_and_the_chat_lives_on(
    tiny: Tiny, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lines = ["/image nowhere.png", "/imag x", "/save", "/image", QUESTION, "/quit", "never asked"]
    code, out, err = talk([str(tiny_model), str(tiny.image())], lines, monkeypatch, capsys)
    assert code == 0
    mistakes = err.splitlines()[1:]
    assert [line.split(";")[0] for line in mistakes[:2]] == [
        "no image nowhere.png",
        "no command /imag",
    ]
    assert "did you mean '/image'?" in mistakes[1] and len(mistakes) == 4
    assert out.strip() == load(tiny_model).ask(tiny.image(), QUESTION).text


def test_without_an_image_it_asks_for_one_and_takes_its_path(
    tiny: Tiny, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    image = tiny.image("colon")
    lines = ["is there necrosis ?", str(image), QUESTION]
    code, out, err = talk([str(tiny_model)], lines, monkeypatch, capsys)
    assert code == 0 and out.startswith("Which image?")
    assert "no image is there necrosis ?" in err
    assert out.splitlines()[-1] == load(tiny_model).ask(image, QUESTION).text


def test_a_missing_image_or_model_on_the_command_line_is_exit_code_2(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for arguments in ([str(tiny_model), "nowhere.png"], [str(tmp_path)]):
        code, _, err = talk(arguments, [], monkeypatch, capsys)
        assert code == 2 and err.count("\n") == 1


@pytest.fixture
def scaled_model(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a model that learnt at 5.6 µm a pixel, 32 pixels a side."""
    to = tmp_path / "scaled"
    shutil.copytree(tiny_model, to)
    config = json.loads((to / "config.json").read_text())
    config["recipe"]["encoder"]["microns_per_pixel"] = 5.6
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_a_slide_is_asked_field_by_field(
    scaled_model: Path, svs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    lines = [QUESTION, "/region 560,560,179.2,179.2", QUESTION, f"/save {saved}"]
    lines += ["/region 0,0,179.2,179.2", "/region 1,2", "/region 0,0,99999,10", QUESTION]
    code, out, err = talk([str(scaled_model), str(svs)], lines, monkeypatch, capsys)
    model = load(scaled_model)
    first, second = (
        model.ask(f"{svs}#{place},179.2,179.2", QUESTION).text for place in ("560,560", "0,0")
    )
    said = out.splitlines()
    assert code == 0 and said[0].startswith(f"{svs} is a slide of ")
    assert "/region x,y,width,height in µm; the model's own is 179 µm wide" in said[0]
    assert said[1] == f"Looking at {svs}#560,560,179.2,179.2; a new conversation."
    assert said[2] == first and said[-1] == second
    mistakes = err.splitlines()[1:]
    assert len(mistakes) == 3 and "is a whole slide; name a field of it first" in mistakes[0]
    assert "'1,2' is no region" in mistakes[1] and "reaches beyond" in mistakes[2]
    assert json.loads(saved.read_text())["image"] == f"{svs}#560,560,179.2,179.2"


def test_a_region_wants_a_scale_that_is_stated(
    scaled_model: Path,
    tiny_model: Path,
    tiny: Tiny,
    svs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    picture, ask = str(tiny.image()), ["/region 0,0,50,50", QUESTION]
    code, out, err = talk([str(scaled_model), picture, "--mpp", "5.6"], ask, monkeypatch, capsys)
    assert code == 0 and f"Looking at {picture}#0,0,50,50" in out and "Note: the region" in out
    code, _, err = talk([str(scaled_model), picture], ask, monkeypatch, capsys)
    assert code == 0 and "does not state its µm per pixel" in err
    code, _, err = talk([str(tiny_model), str(svs)], ask, monkeypatch, capsys)
    assert code == 2 and "does not state the µm per pixel its images were taken at" in err


def test_a_reference_takes_the_scale_that_is_given_with_it(
    scaled_model: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    reference = f"{tiny.image()}#0,0,50,50"
    arguments = [str(scaled_model), reference]
    code, out, err = talk([*arguments, "--mpp", "5.6"], [QUESTION], monkeypatch, capsys)
    by_command = talk(
        [str(scaled_model), str(tiny.image()), "--mpp", "5.6"],
        ["/region 0,0,50,50", QUESTION],
        monkeypatch,
        capsys,
    )
    assert code == 0 and out.splitlines()[-1] == by_command[1].splitlines()[-1], err
    code, _, err = talk(arguments, [QUESTION], monkeypatch, capsys)
    assert code == 2 and "give it with --mpp" in err and err.count("\n") == 1


def test_a_whole_slide_that_is_a_tiff_is_opened_for_its_fields(
    scaled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (512, 512, 3)).astype(np.uint8)
    path = write_pyramid(tmp_path / "slide.tiff", [pixels, halved(pixels)], mpp=None)
    lines = [QUESTION, "/region 100,100,179.2,179.2", QUESTION]
    code, out, err = talk([str(scaled_model), str(path), "--mpp", "2"], lines, monkeypatch, capsys)
    assert code == 0 and out.startswith(f"{path} is a slide of 1024 x 1024 µm")
    assert f"Looking at {path}#100,100,179.2,179.2" in out
    assert "is a whole slide; name a field of it first" in err
    code, _, err = talk([str(scaled_model), str(path)], lines, monkeypatch, capsys)
    assert code == 2 and "give it with --mpp" in err and err.count("\n") == 1


def test_help_names_every_command_and_three_questions(
    tiny: Tiny, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _, out, _ = talk([str(tiny_model), str(tiny.image())], ["/help"], monkeypatch, capsys)
    assert all(name in out for name in ("/image", "/region", "/new", "/save", "/help", "/quit"))
    assert sum(line.strip().endswith("?") for line in out.splitlines()) >= 2


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    tiny: Tiny, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_model)

    def interrupted(*_: object, **__: object) -> Iterator[str]:
        yield "liver"
        raise KeyboardInterrupt

    said: list[str] = []
    conversation = Conversation(model, said.append)
    conversation.look_at(str(tiny.image()))
    monkeypatch.setattr(model, "stream", interrupted)
    assert conversation.take(QUESTION)
    assert conversation.turns[0].answer == "liver" and conversation.turns[0].is_stopped
    assert "stopped" in "".join(said)


def test_a_second_turn_sees_the_first(tiny: Tiny, tiny_model: Path) -> None:
    model = load(tiny_model)
    seen: list[list[tuple[str, str]]] = []
    stream = model.stream

    def watch(features: Any, turns: Any, question: str, **options: Any) -> Iterator[str]:
        seen.append(list(turns))
        return stream(features, turns, question, **options)

    model.stream = watch  # type: ignore[method-assign]
    conversation = Conversation(model, lambda text: None)
    conversation.look_at(str(tiny.image()))
    conversation.take(QUESTION)
    conversation.take("is this liver ?")
    assert seen == [[], [(QUESTION, conversation.turns[0].answer)]]
    conversation.take(f"/image {tiny.image('colon')}")
    assert conversation.turns == []
