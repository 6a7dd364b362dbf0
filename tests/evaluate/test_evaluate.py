"""`clover evaluate` as its user uses it: views, decodings, resuming, endpoints, leaks."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from clover.cli import main
from clover.evaluate.control import agreement, form_table, image_gain, verdict
from clover.evaluate.pixels import CHANGES, scale_stains
from clover.evaluate.rewording import reworded
from clover.evaluate.view import CONTROLS, find_controls
from clover.model import load
from tiny import Tiny, familiar_with_tiny, tiny_clover, write_chessboard


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def clover(*arguments: str | Path) -> Done:
    """Run the command line in this process: torch is imported once."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clover(tiny.recipe).save(tmp_path_factory.mktemp("evaluate") / "model")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


def test_all_controls_are_asked_and_told_in_one_table(
    tiny: Tiny, model: Path, cache: Path, tmp_path: Path
) -> None:
    done = clover(
        *("evaluate", model, "--data", tiny.instructions, "--features", cache),
        *("--out", tmp_path, "--controls", "all", "--control-items", "20"),
    )
    assert done.returncode == 0, done.stderr
    details = json.loads((tmp_path / "scores.json").read_text())["details"]
    assert set(details["views"]) == {"image", *CONTROLS}
    assert set(details["stay"]) == set(CONTROLS)
    for row in ("in grey", "stains shifted", "turned by a quarter", "in other words"):
        assert sum(line.startswith(row) for line in done.stdout.splitlines()) == 1
    assert "The model" in done.stdout
    # Every form's image gain has its interval.
    assert all(
        {"value", "low", "high", "n"} <= form["gain"].keys() for form in details["forms"].values()
    )
    asked = list(lines(tmp_path / "paraphrase.jsonl")[1:])
    assert asked and all(row["asked"] != row["question"] for row in asked)


def test_images_unlike_the_training_ones_are_counted(
    tiny: Tiny, model: Path, cache: Path, tmp_path: Path
) -> None:
    knowing = tmp_path / "model"
    shutil.copytree(model, knowing)
    familiarity = familiar_with_tiny(load(model), tmp_path / "learnt")
    familiarity.save(knowing / "familiarity.safetensors")
    board = write_chessboard(tmp_path / "board.png")
    asked = [json.loads(line) for line in tiny.instructions.read_text().splitlines()[:6]]
    for row in asked:
        row["image"] = str(tiny.instructions.parent / row["image"])
    asked.append({**asked[0], "id": "strange", "image": str(board)})
    data = tmp_path / "asked.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in asked))
    out = tmp_path / "out"
    done = clover("evaluate", knowing, "--data", data, "--features", cache, "--out", out)
    assert done.returncode == 0, done.stderr
    sentence = "1 of 4 images are unlike those the model learnt from."
    assert sentence in done.stdout
    assert json.loads((out / "scores.json").read_text())["details"]["unfamiliar"] == {
        "images": 1,
        "of": 4,
        "sentence": sentence,
    }


def test_the_header_names_model_prompt_decoding_and_data(
    tiny: Tiny, model: Path, cache: Path, tmp_path: Path
) -> None:
    done = clover(
        *("evaluate", model, "--data", tiny.instructions, "--features", cache),
        *("--out", tmp_path, "--predict-only", "--decoding", "sense"),
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "scores.json").exists()
    header, *rows = lines(tmp_path / "predictions.jsonl")
    found = header["header"]
    config = json.loads((model / "config.json").read_text())
    assert found["model_hash"] == config["bridge_sha256"]
    assert found["prompt"]["template"] == tiny.recipe.prompt.template
    assert found["decoding"]["name"] == "sense"
    assert found["decoding"]["closed"] == ["yes", "no"]
    assert len(found["data"]) == 16
    closed = [row["prediction"] for row in rows if row["answer_type"] == "closed"]
    assert closed and set(closed) <= {"yes", "no"}


def test_the_papers_decoding_searches_with_five_beams(
    tiny: Tiny, model: Path, cache: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(tiny.instructions.read_text().splitlines()[:4]) + "\n")
    done = clover(
        *("evaluate", model, "--data", few, "--images", tiny.instructions.parent),
        *("--features", cache, "--out", tmp_path, "--predict-only", "--decoding", "paper"),
    )
    assert done.returncode == 0, done.stderr
    found = lines(tmp_path / "predictions.jsonl")[0]["header"]["decoding"]
    expected = {"num_beams": 5, "min_tokens": 5, "max_tokens": 40, "repetition_penalty": 1.5}
    assert {name: found[name] for name in expected} == expected
    assert found["length_penalty"] == 0.0  # a decoder-only model; -1 for T5


def test_a_finished_file_is_read_and_an_unfinished_one_continued(
    tiny: Tiny, model: Path, cache: Path, tmp_path: Path
) -> None:
    """Lines of the part file stand for answers given before a kill: they are not asked again."""
    command = (
        *("evaluate", model, "--data", tiny.instructions, "--features", cache),
        *("--out", tmp_path, "--predict-only"),
    )
    assert clover(*command).returncode == 0
    path = tmp_path / "predictions.jsonl"
    whole = path.read_bytes()
    header, *rows = lines(path)
    before = path.stat().st_mtime_ns
    marked = [{**row, "prediction": f"kept {place}"} for place, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [header, *marked]))
    assert clover(*command).returncode == 0
    assert [row["prediction"] for row in lines(path)[1:]] == [f"kept {i}" for i in range(len(rows))]
    # A header of another decoding: asked anew.
    header["header"]["decoding"]["max_tokens"] = 99
    path.write_text("".join(json.dumps(row) + "\n" for row in [header, *marked]))
    assert clover(*command).returncode == 0
    assert path.read_bytes() == whole
    assert path.stat().st_mtime_ns != before


class Peer:
    """An OpenAI-compatible endpoint that answers by the colour of the image it is sent."""

    def __init__(self, *, seconds: float = 0.0, broken: int = 0) -> None:
        peer = self
        self.requests: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.broken = broken
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    peer.requests.append(body)
                    number = len(peer.requests)
                    peer.at_once += 1
                    peer.most_at_once = max(peer.most_at_once, peer.at_once)
                time.sleep(seconds)
                with lock:
                    peer.at_once -= 1
                if number <= peer.broken:
                    self._send(400, {"error": {"message": "no such thing"}})
                    return
                message = {"role": "assistant", "content": peer.answer(body)}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "peer"}
                self._send(200, {**reply, "choices": [choice]})

            def _send(self, code: int, value: dict[str, Any]) -> None:
                data = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, body: dict[str, Any]) -> str:
        content = body["messages"][0]["content"]
        images = [part for part in content if part["type"] == "image_url"]
        if not images:
            return "no"
        data = base64.b64decode(images[0]["image_url"]["url"].partition(",")[2])
        mean = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean(axis=(0, 1))
        tissue = ("liver", "colon", "kidney")[int(mean.argmax())]
        question = content[-1]["text"]
        return tissue if question.startswith("which") else ("yes" if tissue in question else "no")


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer(seconds=0.02)
    yield made
    made.server.shutdown()


def test_a_peer_behind_an_endpoint_is_scored_with_controls(
    tiny: Tiny, peer: Peer, tmp_path: Path
) -> None:
    done = clover(
        *("evaluate", "--endpoint", peer.url, "--model", "peer", "--data", tiny.instructions),
        *("--out", tmp_path, "--controls", "blind,shuffled", "--concurrency", "3"),
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["open_recall"] == 100.0  # it looks, and reads colours right
    assert scores["image_gain_open"] == 100.0
    assert 1 < peer.most_at_once <= 3
    first = peer.requests[0]["messages"][0]["content"]
    assert first[0]["image_url"]["url"].startswith("data:image/png;base64,")
    header = lines(tmp_path / "predictions.jsonl")[0]["header"]
    assert header["model"] == "peer" and header["endpoint"] == peer.url
    asked = len(peer.requests)
    again = clover(
        *("evaluate", "--endpoint", peer.url, "--model", "peer", "--data", tiny.instructions),
        *("--out", tmp_path, "--controls", "blind,shuffled", "--concurrency", "3"),
    )
    assert again.returncode == 0 and len(peer.requests) == asked


def test_after_a_kill_nothing_is_asked_twice(tiny: Tiny, tmp_path: Path) -> None:
    slow = Peer(seconds=0.15)
    command = [
        *(sys.executable, "-m", "clover.cli", "evaluate", "--endpoint", slow.url),
        *("--model", "peer", "--data", str(tiny.instructions), "--out", str(tmp_path)),
        *("--predict-only", "--concurrency", "2"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "predictions.part"
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 8):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    answered = {json.loads(line)[0] for line in part.read_bytes().splitlines()[1:]}
    assert len(answered) > 6
    time.sleep(0.4)  # what was on the way when it was killed
    sent = len(slow.requests)
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    slow.server.shutdown()
    total = len(lines(tmp_path / "predictions.jsonl")) - 1
    assert len(slow.requests) - sent == total - len(answered)
    # The same file as one that was never stopped.
    fresh = Peer()
    other = tmp_path / "other"
    done = clover(
        *("evaluate", "--endpoint", fresh.url, "--model", "peer", "--data", tiny.instructions),
        *("--out", other, "--predict-only"),
    )
    fresh.server.shutdown()
    assert done.returncode == 0
    assert lines(other / "predictions.jsonl")[1:] == lines(tmp_path / "predictions.jsonl")[1:]


def test_questions_that_failed_are_named_and_asked_again(tiny: Tiny, tmp_path: Path) -> None:
    flawed = Peer(broken=3)
    command = (
        *("evaluate", "--endpoint", flawed.url, "--model", "peer", "--data", tiny.instructions),
        *("--out", tmp_path, "--predict-only", "--concurrency", "1"),
    )
    done = clover(*command)
    assert done.returncode == 2
    assert "3 of 48 questions got no answer from peer" in done.stderr
    assert "no such thing" in done.stderr
    assert len(flawed.requests) == 48
    assert clover(*command).returncode == 0
    flawed.server.shutdown()
    assert len(flawed.requests) == 51


def test_an_unreadable_image_costs_its_own_questions_alone(tiny: Tiny, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in tiny.instructions.read_text().splitlines()]
    whole = tiny.instructions.parent / rows[0]["image"]
    (tmp_path / "torn.png").write_bytes(whole.read_bytes()[:60])
    rows = [row | {"image": str(tiny.instructions.parent / row["image"])} for row in rows]
    rows[5]["image"] = str(tmp_path / "torn.png")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    peer = Peer()
    done = clover(
        *("evaluate", "--endpoint", peer.url, "--model", "peer", "--data", data),
        *("--out", tmp_path / "out", "--predict-only", "--concurrency", "4"),
    )
    peer.server.shutdown()
    assert done.returncode == 2 and done.stderr.count("cannot be read as an image") == 1
    assert f"1 of {len(rows)} questions got no answer" in done.stderr
    assert len(peer.requests) == len(rows) - 1
    assert len(lines(tmp_path / "out" / "predictions.part")) == len(rows)  # header and the others


def test_a_peer_is_shown_regions_of_slides_at_the_resolution_that_is_stated(
    tiny: Tiny, peer: Peer, tmp_path: Path
) -> None:
    pixels = np.full((64, 96, 3), (200, 40, 40), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "slide.tif", resolution=1e4 / 0.5, resolution_unit=3)
    rows = [json.loads(line) for line in tiny.instructions.read_text().splitlines()[:2]]
    rows = [row | {"image": str(tiny.instructions.parent / row["image"])} for row in rows]
    rows.append({**rows[0], "id": "region", "image": str(tmp_path / "slide.tif#4,2,20,10")})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("evaluate", "--endpoint", peer.url, "--model", "peer", "--data", data)
    done = clover(*command, "--out", tmp_path / "aside")
    assert done.returncode == 0, done.stderr
    aside = (tmp_path / "aside" / "rejected.jsonl").read_text()
    assert "region of a slide" in aside and "--microns-per-pixel" in aside
    assert len(peer.requests) == 2
    done = clover(*command, "--out", tmp_path / "out", "--microns-per-pixel", "0.25")
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "out" / "predictions.jsonl")) == 4
    sent = [request["messages"][0]["content"][0]["image_url"]["url"] for request in peer.requests]
    sizes = [
        Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in sent[2:]
    ]
    assert sorted(sizes) == [(32, 32), (32, 32), (80, 40)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name either a MODEL folder or --endpoint"),
        (("--endpoint", "ftp://x", "--model", "m"), "'ftp://x' is not a URL"),
        (("--endpoint", "http://127.0.0.1:1/v1"), "--endpoint needs --model"),
        (
            ("--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--controls", "blnd"),
            "no control 'blnd'; did you mean 'blind'?",
        ),
        (("model", "--microns-per-pixel", "0.5"), "--microns-per-pixel is for --endpoint"),
    ],
)
def test_mistakes_are_named_in_a_line(
    tiny: Tiny, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = clover("evaluate", "--data", tiny.instructions, "--out", tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_training_questions_on_the_same_images_are_refused(
    tiny: Tiny, model: Path, cache: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(tiny.instructions.read_text().splitlines()[:12]) + "\n")
    command = (
        *("evaluate", model, "--data", few, "--images", tiny.instructions.parent),
        *("--train", tiny.instructions, "--features", cache, "--out", tmp_path),
    )
    done = clover(*command)
    assert done.returncode == 2
    assert "share 6 evaluation images" in done.stderr and "--allow-leaks" in done.stderr
    assert clover(*command, "--allow-leaks").returncode == 0


def test_gain_and_agreement_are_what_they_say() -> None:
    def row(number: int, said: str, answer: str, kind: str = "closed") -> dict[str, Any]:
        return {
            "id": number,
            "image": f"{number}.png",
            "question": "q",
            "answer": answer,
            "answer_type": kind,
            "prediction": said,
        }

    seen = [row(0, "yes", "yes"), row(1, "no", "no"), row(2, "Yes.", "no"), row(3, "no", "no")]
    blind = [row(0, "yes", "yes"), row(1, "yes", "no"), row(2, "yes", "no"), row(3, "yes", "no")]
    assert image_gain(seen, blind)["closed"]["difference"] == pytest.approx(50.0)
    assert agreement(seen, blind)["value"] == pytest.approx(50.0)  # "Yes." is "yes"
    table = form_table({"image": seen, "blind": blind}, {}, draws=200)
    assert table["q (closed)"]["gain"]["value"] == pytest.approx(50.0)
    assert "does not look" in verdict({"blind": image_gain(blind, blind)})


def test_no_dye_changed_is_the_same_picture_and_each_dye_changes_its_own() -> None:
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(60, 250, (24, 24, 3), dtype=np.uint8))
    same = np.asarray(scale_stains(picture, haematoxylin=1, eosin=1), dtype=int)
    assert np.abs(same - np.asarray(picture, dtype=int)).max() <= 1
    # A pixel of haematoxylin alone: its density doubles, whatever happens to eosin.
    density = 0.4 * np.array([0.650, 0.704, 0.286]) / np.linalg.norm([0.650, 0.704, 0.286])
    pixel = np.round(256 * 10**-density - 1).astype(np.uint8)
    alone = Image.fromarray(np.tile(pixel, (2, 2, 1)))
    more = np.asarray(scale_stains(alone, haematoxylin=2, eosin=3), dtype=float)[0, 0]
    assert more == pytest.approx(256 * 10 ** -(2 * density) - 1, abs=3)


def test_changed_pictures_keep_their_size_and_change_the_same_way_every_time() -> None:
    random = np.random.default_rng(1)
    picture = Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    for name, change in CHANGES.items():
        made = change(picture, "a")
        assert made.mode == "RGB" and sorted(made.size) == [20, 30]
        assert np.array_equal(np.asarray(made), np.asarray(change(picture, "a")))
        assert not np.array_equal(np.asarray(made).ravel(), np.asarray(picture).ravel()), name
    assert not np.array_equal(
        np.asarray(CHANGES["stain"](picture, "a")), np.asarray(CHANGES["stain"](picture, "b"))
    )


@pytest.mark.parametrize(
    ("question", "made"),
    [
        ("Is there necrosis?", {"Does this image show necrosis?", "Can necrosis be seen here?"}),
        (
            "What is the diagnosis?",
            {"Which diagnosis does this image support?", "Name the diagnosis."},
        ),
        ("is this kidney ?", {"Does this image show kidney?", "Is kidney what is shown here?"}),
        (
            "Is this tissue from the colon?",
            {
                "Does this tissue come from the colon?",
                "Is the colon where this tissue comes from?",
            },
        ),
        ("Why is the sky blue?", {None}),
    ],
)
def test_a_question_is_put_in_other_words_or_left(question: str, made: set[str | None]) -> None:
    assert reworded(question) in made
    assert reworded(question) == reworded(question)


def test_two_processes_do_not_predict_into_one_folder(
    tiny: Tiny, model: Path, tmp_path: Path
) -> None:
    with (tmp_path / ".predictions.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("123")
        other.flush()
        done = clover(
            *("evaluate", model, "--data", tiny.instructions, "--out", tmp_path),
            *("--features", tiny.folder / "cache"),
        )
    assert done.returncode == 2 and not (tmp_path / "predictions.part").exists()
    assert f"another process predicts into {tmp_path} (process 123)" in done.stderr


def test_controls_have_names() -> None:
    assert find_controls(None) == ()
    assert find_controls("basic") == ("blind", "shuffled", "noise")
    assert find_controls("jpeg,blind") == ("blind", "jpeg")
    assert find_controls("all") == CONTROLS
