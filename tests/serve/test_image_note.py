"""Of an image unlike those the model learnt from, chat and server say so; of others nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.tiny import (
    QUESTION,
    Tiny,
    build_tiny,
    familiar_with_tiny,
    tiny_clover,
    write_chessboard,
)

from clover.model import Clover
from clover.serve.app import create_app
from clover.serve.chat import Conversation
from clover.serve.engine import Engine
from clover.serve.request import Served
from clover.serve.server import serving
from clover.serve.settings import ServeSettings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def clover(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Clover:
    """Return a model that knows reddish, greenish and bluish noise."""
    clover = tiny_clover(tiny.recipe)
    clover.familiarity = familiar_with_tiny(clover, tmp_path_factory.mktemp("learnt"))
    return clover


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chessboard(tmp_path_factory.mktemp("strange") / "page.png")


@pytest.fixture(scope="module")
def client(clover: Clover) -> Iterator[openai.OpenAI]:
    settings = ServeSettings(port=0)
    engine = Engine([Served("tiny", clover.language, clover)], settings)
    with serving(create_app(engine, settings), settings) as url:
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    engine.close()


def asked(path: Path) -> list[object]:
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": uri}}]
    return [{"role": "user", "content": parts}]


def test_the_server_says_it_each_time_whole_and_streamed(
    client: openai.OpenAI, clover: Clover, tiny: Tiny, strange: Path
) -> None:
    for path, expected in ((strange, clover.ask(strange, QUESTION).note), (tiny.image(), None)):
        assert (expected is None) == (path != strange)
        for _ in range(2):  # the second time nothing is computed any more
            reply = client.chat.completions.create(model="tiny", messages=asked(path))  # type: ignore[arg-type]
            assert (reply.model_extra or {}).get("image_note") == expected
        chunks = client.chat.completions.create(
            model="tiny",
            messages=asked(path),  # type: ignore[arg-type]
            stream=True,
        )
        notes = {(chunk.model_extra or {}).get("image_note") for chunk in chunks}
        assert notes == {expected}


def test_the_terminal_says_it_when_the_image_is_opened(
    clover: Clover, tiny: Tiny, strange: Path
) -> None:
    said: list[str] = []
    conversation = Conversation(clover, said.append)
    conversation.take(f"/image {tiny.image()}")
    assert "unlike" not in "".join(said)
    conversation.take(f"/image {strange}")
    assert "this image is unlike those the model learnt from" in "".join(said)
