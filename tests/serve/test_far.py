"""The far side against a server of ours that speaks vLLM's documented wire format.

Not run against vLLM itself.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import queue
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import openai
import pytest
import torch
from tests.serve.running import Running, data_uri, running, seen, tiny_folder
from tests.tiny import Tiny

from clover.core.files import sha256_file
from clover.language.protocol import GenerationSettings
from clover.model import Clover, load, open_image
from clover.serve.engine import Engine
from clover.serve.far import FarLanguage, FarRunning, encode_embeds
from clover.serve.request import BusyError, Picture, Question, Served
from clover.serve.settings import ServeSettings

QUESTION = "describe the image"


class Far:
    """A completions server over the same tiny model, which notes what it is sent."""

    def __init__(self, clover: Clover) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.is_busy = False
        far = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, json.dumps({"object": "list", "data": [{"id": "far-model"}]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                far.paths.append(self.path)
                far.bodies.append(body)
                if far.is_busy:
                    self._send(429, json.dumps({"error": {"message": "full"}}))
                    return
                embeds = torch.load(
                    io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True)),
                    weights_only=True,
                )
                language: Any = clover.language
                ids = language.model.generate(
                    inputs_embeds=embeds[None],
                    attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
                    max_new_tokens=body["max_tokens"],
                    min_new_tokens=body["min_tokens"],
                    do_sample=False,
                    eos_token_id=body["stop_token_ids"],
                    pad_token_id=1,
                )[0].tolist()
                rows = []
                shown = ""
                for count in range(1, len(ids) + 1):
                    text = language.tokens.decode(ids[:count])
                    reason = None
                    if count == len(ids):
                        reason = "stop" if ids[-1] in body["stop_token_ids"] else "length"
                    choice = {"index": 0, "text": text[len(shown) :], "finish_reason": reason}
                    row = {"id": "c", "object": "text_completion", "created": 0, "model": "m"}
                    rows.append(f"data: {json.dumps({**row, 'choices': [choice]})}\n\n")
                    shown = text
                self._send(200, "".join(rows) + "data: [DONE]\n\n", "text/event-stream")

            def _send(self, status: int, text: str, kind: str = "application/json") -> None:
                content = text.encode()
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    return tiny_folder(tmp_path_factory.mktemp("far"))


@pytest.fixture(scope="module")
def clover(parts: tuple[Tiny, Path]) -> Clover:
    return load(parts[1], device="cpu", precision="float32")


@pytest.fixture(scope="module")
def far(clover: Clover) -> Iterator[Far]:
    far = Far(clover)
    yield far
    far.server.shutdown()


@pytest.fixture(scope="module")
def server(parts: tuple[Tiny, Path], far: Far) -> Iterator[Running]:
    arguments = [f"tiny={parts[1]}", "--language-endpoint", far.url]
    with running(*arguments, CLOVER_LANGUAGE_KEY="far-key") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        yield client


def test_a_payload_is_a_torch_file_of_one_tensor_and_no_more() -> None:
    table = torch.arange(4000, dtype=torch.float32).view(1000, 4)
    content = base64.b64decode(encode_embeds(table[3:5]), validate=True)
    assert content[:4] == b"PK\x03\x04"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        data = next(name for name in archive.namelist() if name.endswith("/data/0"))
        assert archive.read(data) == table[3:5].numpy().tobytes()
    assert torch.equal(torch.load(io.BytesIO(content), weights_only=True), table[3:5])


def test_the_far_side_is_sent_the_prompt_and_its_answer_is_ours(
    client: openai.OpenAI, clover: Clover, far: Far, parts: tuple[Tiny, Path]
) -> None:
    path = parts[0].image("colon")
    messages: Any = [seen(QUESTION, data_uri(path))]
    reply = client.chat.completions.create(model="tiny", messages=messages)
    assert reply.choices[0].message.content == clover.ask(path, QUESTION).text
    body, language = far.bodies[-1], clover.language
    assert far.paths[-1] == "/v1/completions"
    assert (body["model"], body["prompt"], body["stream"]) == ("far-model", "", True)
    assert (body["max_tokens"], body["temperature"], body["min_tokens"]) == (6, 0.0, 1)
    sent = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    embeds, _ = language._embedded(  # type: ignore[attr-defined]
        clover.visual_prefix(clover.encode(path), [QUESTION]),
        [language.instruction_ids(QUESTION)],  # type: ignore[attr-defined]
        language.prefix_ids,  # type: ignore[attr-defined]
    )
    assert sent.shape == embeds[0].shape
    torch.testing.assert_close(sent, embeds[0], atol=1e-6, rtol=1e-6)
    chunks = client.chat.completions.create(model="tiny", messages=messages, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == reply.choices[0].message.content


def test_the_far_sides_trouble_is_told_as_such(
    client: openai.OpenAI, far: Far, parts: tuple[Tiny, Path]
) -> None:
    messages: Any = [seen(QUESTION, data_uri(parts[0].image()))]
    far.is_busy = True
    try:
        with pytest.raises(openai.RateLimitError, match="is busy"):
            client.chat.completions.create(model="tiny", messages=messages)
    finally:
        far.is_busy = False
    with pytest.raises(openai.BadRequestError, match="logprobs are not passed"):
        client.chat.completions.create(model="tiny", messages=messages, logprobs=True)


def test_all_that_come_at_once_are_counted_before_anything_is_waited_for(
    clover: Clover, parts: tuple[Tiny, Path]
) -> None:
    engine = Engine([Served("tiny", clover.language, clover)], ServeSettings())  # type: ignore[arg-type]
    path = parts[0].image()
    picture = Picture(sha256_file(path), clover.encoder.prepare(open_image(path)))
    question = Question("tiny", GenerationSettings(max_tokens=4), QUESTION, picture)
    # Nobody listens there: what is admitted fails in the end.
    nowhere = "http://127.0.0.1:9/v1"

    async def flood() -> list[BaseException | None]:
        far = FarLanguage(nowhere, key=None, max_requests=2)
        running = [FarRunning(engine, question, far) for _ in range(6)]
        gate: queue.SimpleQueue[None] = queue.SimpleQueue()
        engine.call(gate.get)
        told = await asyncio.gather(*(one.submit() for one in running), return_exceptions=True)
        assert far.num_requests == 2
        gate.put(None)
        ended = await asyncio.gather(
            *(one.next_event() for one in running[:2]), return_exceptions=True
        )
        assert all("does not answer" in str(error.detail) for error in ended)  # type: ignore[union-attr]
        await asyncio.sleep(0)
        assert far.num_requests == 0
        # One that is let go of before it has begun gives its place free too.
        late = FarRunning(engine, question, far)
        await late.submit()
        late.stop(asyncio.create_task(asyncio.sleep(0)))
        await asyncio.sleep(0.01)
        assert far.num_requests == 0
        return told

    told = asyncio.run(flood())
    engine.close()
    assert told[:2] == [None, None]
    assert all(isinstance(error, BusyError) for error in told[2:])
    counts = engine.counts
    assert (counts.refused, counts.failed, counts.cancelled, counts.answers) == (4, 2, 1, 0)


def test_the_figures_count_what_the_far_side_writes(
    client: openai.OpenAI, parts: tuple[Tiny, Path]
) -> None:
    def figures() -> list[int]:
        lines = client.get("/../metrics", cast_to=str).splitlines()
        wanted = ('clover_answers_total{result="answered"}', 'clover_tokens_total{kind="written"}')
        return [int(line.split()[1]) for line in lines if line.split()[0] in wanted]

    before = figures()
    messages: Any = [seen(QUESTION, data_uri(parts[0].image()))]
    reply = client.chat.completions.create(model="tiny", messages=messages)
    assert reply.usage is not None
    assert figures() == [before[0] + 1, before[1] + reply.usage.completion_tokens]


def test_the_banner_says_that_prompts_leave(server: Running, far: Far) -> None:
    assert f"answers are written by {far.url}: prompts leave this server" in server.banner
