"""Whether a model looks: what the controls must show, whose image they show, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from clover.cli import cli
from clover.evaluate.control import Row, image_gain, verdict
from clover.evaluate.partner import choose_partners
from tiny import QUESTION, Tiny, tiny_clover

SEEN = [f"{place % 2}" for place in range(200)]


def rows(said: list[str], kind: str = "closed") -> list[Row]:
    """Return predictions for 200 questions on as many images, half of them true."""
    answers = {"closed": ("yes", "no"), "open": ("liver", "colon")}[kind]
    words = {"0": answers[0], "1": answers[1]}
    return [
        {
            "id": f"{kind}{place}",
            "image": f"{place}.png",
            "question": "q",
            "answer": words[SEEN[place]],
            "answer_type": kind,
            "prediction": words.get(text, text),
        }
        for place, text in enumerate(said)
    ]


def sentence(**views: list[Row]) -> str:
    image = views.pop("image")
    return verdict({view: image_gain(image, found) for view, found in views.items()})


EMPTY, OTHERS = [""] * 200, ["0"] * 200


def test_a_model_that_answers_alike_with_any_image_does_not_look() -> None:
    said = sentence(image=rows(SEEN), blind=rows(EMPTY), shuffled=rows(SEEN), noise=rows(SEEN))
    assert said == (
        "The model needs an image but does not read it: on closed questions the image is worth "
        "100.0 [100.0, 100.0] points, but the score shows no proven fall with another image "
        "(0.0 [0.0, 0.0] points, n=200) and with noise (0.0 [0.0, 0.0] points, n=200)."
    )


def test_each_control_that_was_run_must_agree() -> None:
    looks = sentence(image=rows(SEEN), blind=rows(EMPTY), shuffled=rows(OTHERS), noise=rows(EMPTY))
    assert looks == (
        "The model looks: on closed questions the image is worth 100.0 [100.0, 100.0] points; "
        "with another image it loses 50.0 points (closed)."
    )
    denied = sentence(image=rows(SEEN), blind=rows(EMPTY), shuffled=rows(OTHERS), noise=rows(SEEN))
    assert denied.startswith("The model needs an image but does not read it")
    assert "no proven fall with noise" in denied and "it loses 50.0 points (closed)" in denied
    assert sentence(image=rows(SEEN), blind=rows(EMPTY)).startswith("The model looks: ")
    nothing = sentence(image=rows(OTHERS), blind=rows(OTHERS), shuffled=rows(OTHERS))
    assert nothing.startswith("The model does not look: on closed questions the image shows no")
    unknown = sentence(image=rows(SEEN), shuffled=rows(SEEN))
    assert unknown.startswith("Not known")


def test_a_small_fall_counts_where_its_interval_is_above_nothing() -> None:
    part = [text if place < 170 else "0" for place, text in enumerate(SEEN)]
    said = sentence(image=rows(SEEN), blind=rows(EMPTY), shuffled=rows(part))
    assert said.startswith("The model looks: ") and "it loses 7.5 points (closed)" in said


def test_a_control_may_deny_one_kind_of_question_alone() -> None:
    both = {
        "image": rows(SEEN) + rows(SEEN, "open"),
        "blind": rows(EMPTY) + rows(EMPTY, "open"),
        "shuffled": rows(SEEN) + rows(OTHERS, "open"),
    }
    said = sentence(**both)
    assert said.startswith("The model looks only in part: on closed questions")
    assert said.count("no proven fall") == 1
    assert said.endswith("on open questions the image is worth 100.0 [100.0, 100.0] points.")


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_another_image_is_of_another_group_where_there_is_one() -> None:
    groups, digests = ["a"] * 400 + ["b"], [f"{place}" for place in range(401)]
    partners = choose_partners(groups, digests, random())
    assert set(partners[:400]) == {400} and partners[400] < 400
    # The same bytes in another group are no other image.
    assert choose_partners(["a", "a", "b"], ["x", "y", "x"], random()) == [1, 2, 1]


def test_another_image_is_of_the_same_group_where_there_is_no_other() -> None:
    digests = ["x", "x", "y", "z", "z", "z"]
    partners = choose_partners(["patient1"] * 6, digests, random())
    assert all(digests[place] != digests[other] for place, other in enumerate(partners))
    assert choose_partners(["a", "b"], ["x", "x"], random()) == [0, 1]


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


@pytest.fixture(scope="module")
def model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clover(tiny.recipe).save(tmp_path_factory.mktemp("control") / "model")


def write_questions(path: Path, images: list[str], *, group: str | None = None) -> Path:
    """Write an open question and a closed one about each image."""
    lines: list[dict[str, Any]] = []
    for place, image in enumerate(images):
        about = {"image": image, **({"group": group} if group else {})}
        asked = {"question": QUESTION, "answer": "liver", "answer_type": "open"}
        closed = {"question": "is this liver ?", "answer": "yes", "answer_type": "closed"}
        lines += [{"id": f"o{place}", **about, **asked}, {"id": f"c{place}", **about, **closed}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_of_one_group_another_of_its_images_is_shown_and_counted(
    tiny: Tiny, model: Path, tmp_path: Path
) -> None:
    images = [str(path) for path in sorted((tiny.folder / "data" / "images").iterdir())]
    data = write_questions(tmp_path / "data.jsonl", images[:3], group="patient1")
    command = ("evaluate", model, "--data", data, "--controls", "blind,shuffled")
    said = run(*command, "--features", tmp_path, "--out", tmp_path / "out")
    line = (
        "With another image: 6 of 6 questions were shown one of their own group, as no other group "
        "has one; it may show the same finding."
    )
    assert said.count(line) == 1
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["details"]["remarks"] == [
        line
    ]
    header = json.loads((tmp_path / "out" / "shuffled.jsonl").read_text().splitlines()[0])
    assert header["header"]["shown_of_own_group"] == 6


def test_of_one_image_there_is_no_other(
    tiny: Tiny, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_questions(tmp_path / "data.jsonl", [str(tiny.image())] * 2)
    command = ("evaluate", model, "--data", data, "--controls", "--features", tmp_path)
    line = "Without the control with another image: all questions are about one image."
    said = run(*command, "--out", tmp_path / "out")
    assert said.count(line) == 1 and "with another image  " not in said
    assert not (tmp_path / "out" / "shuffled.jsonl").exists()
    run(*command, "--out", tmp_path / "predicted", "--predict-only")
    assert caplog.messages == [line]
