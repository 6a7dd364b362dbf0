"""What the way of writing cannot give is refused with the way out: scores or a schema of beams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.serve.running import data_uri, seen
from tests.tiny import QUESTION, Tiny, build_tiny, tiny_clover

from clover.model import Clover
from clover.serve.app import create_app
from clover.serve.engine import Engine
from clover.serve.request import Served
from clover.serve.settings import ServeSettings

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
AS_JSON = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@contextmanager
def asking(clover: Clover) -> Iterator[TestClient]:
    settings = ServeSettings()
    engine = Engine([Served("tiny", clover.language, clover)], settings)  # type: ignore[arg-type]
    with TestClient(create_app(engine, settings), base_url="http://127.0.0.1") as client:
        yield client
    engine.close()


@pytest.fixture(scope="module")
def beams(tiny: Tiny) -> Iterator[TestClient]:
    evaluate = tiny.recipe.evaluate.model_copy(update={"num_beams": 3})
    with asking(tiny_clover(tiny.recipe.model_copy(update={"evaluate": evaluate}))) as client:
        yield client


@pytest.fixture(scope="module")
def windows(tiny: Tiny) -> Iterator[TestClient]:
    clover = tiny_clover(tiny.recipe)
    clover.language.model.config.sliding_window = 64  # type: ignore[attr-defined]
    with asking(clover) as client:
        yield client


def put(client: TestClient, image: Path, **more: Any) -> tuple[int, str]:
    """Return status and the error's message, or the answer."""
    body = {"model": "tiny", "messages": [seen(QUESTION, data_uri(image))], **more}
    reply = client.post("/v1/chat/completions", json=body)
    found = reply.json()
    if reply.status_code == 200:
        return 200, found["choices"][0]["message"]["content"]
    return reply.status_code, found["error"]["message"]


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (AS_JSON, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_beam_search_refuses_what_it_cannot_give(
    beams: TestClient, tiny: Tiny, more: dict[str, Any], name: str
) -> None:
    status, message = put(beams, tiny.image(), **more)
    assert status == 400
    assert message == (
        f"{name} does not go with beam search, and 'tiny' searches with 3 beams; set a temperature "
        "above 0, which samples, or leave it out"
    )
    if name == "logprobs":  # the way out is one; JSON the tiny model's words cannot write
        assert put(beams, tiny.image(), temperature=0.5, **more)[0] == 200
    assert put(beams, tiny.image(), response_format={"type": "text"})[0] == 200


def test_a_model_with_sliding_windows_has_no_scores_and_says_so(
    windows: TestClient, tiny: Tiny
) -> None:
    assert put(windows, tiny.image())[0] == 200
    status, message = put(windows, tiny.image(), logprobs=True)
    assert status == 400
    assert message.startswith("logprobs are not known of 'tiny': it is an encoder-decoder or has")
