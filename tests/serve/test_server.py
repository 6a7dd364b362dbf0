"""`clover serve` in a process of its own, asked as users ask: official clients, curl, sockets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fastapi.testclient import TestClient
from tests.npm import fetched
from tests.serve.running import Running, data_uri, environment, running, seen, tiny_folder
from tests.tiny import Tiny

from clover.core.errors import CloverError
from clover.core.files import read_json
from clover.language.protocol import GenerationSettings
from clover.model import Clover, build_bridge, load, save_bridge
from clover.qformer.bridge import Bridge
from clover.serve import wire
from clover.serve.app import create_app
from clover.serve.engine import Engine
from clover.serve.run import _check_formats, load_served
from clover.serve.settings import ServeSettings
from clover.serve.wire import ChatRequest, EmbeddingRequest

QUESTION = "describe the image"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    return tiny_folder(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def alignment(parts: tuple[Tiny, Path], clover: Clover) -> tuple[Path, Bridge]:
    bridge = build_bridge(parts[0].recipe, clover.encoder, clover.tokenizer, has_alignment=True)
    path = parts[1].parent / "align.safetensors"
    save_bridge(bridge, path)
    return path, bridge.eval()


@pytest.fixture(scope="module")
def server(parts: tuple[Tiny, Path], alignment: tuple[Path, Bridge]) -> Iterator[Running]:
    models = [f"tiny={parts[1]}", f"other={parts[1]}"]
    with running(*models, "--max-waiting", "8", "--align", str(alignment[0])) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture(scope="module")
def clover(parts: tuple[Tiny, Path]) -> Clover:
    return load(parts[1], device="cpu", precision="float32")


def ask(client: openai.OpenAI, messages: list[Any], **more: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **more)


def test_it_says_what_it_serves_where_and_with_which_limits(server: Running) -> None:
    assert "tiny: tiny/patches, bridge of" in server.banner
    assert f"at http://127.0.0.1:{server.port}/v1" in server.banner
    assert "16 answers at once, 8 wait, 20 MiB a request, 50 megapixels" in server.banner
    assert "not for diagnosis" in server.banner


def test_the_model_list_names_every_adapter(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").owned_by == "clover"
    with pytest.raises(openai.NotFoundError, match="no model 'none'"):
        client.models.retrieve("none")


def test_an_answer_is_that_of_clover_ask(
    client: openai.OpenAI, clover: Clover, parts: tuple[Tiny, Path]
) -> None:
    for tissue in ("liver", "colon"):
        path = parts[0].image(tissue)
        reply = ask(client, [seen(QUESTION, data_uri(path))])
        assert reply.choices[0].message.content == clover.ask(path, QUESTION).text
        assert reply.notice == "Research use only, not for diagnosis."
        usage = reply.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert 1 <= usage.completion_tokens <= 6


def test_a_streamed_answer_is_the_whole_one_in_pieces(
    client: openai.OpenAI, parts: tuple[Tiny, Path]
) -> None:
    messages = [seen(QUESTION, data_uri(parts[0].image()))]
    whole = ask(client, messages, max_tokens=12)
    options = {"include_usage": True}
    chunks = list(ask(client, messages, max_tokens=12, stream=True, stream_options=options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.strip() == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 2


def test_a_conversation_keeps_its_turns_in_view(
    client: openai.OpenAI, clover: Clover, parts: tuple[Tiny, Path]
) -> None:
    path = parts[0].image("kidney")
    features, turns = clover.encode(path), []
    messages = [seen("is this liver ?", data_uri(path))]
    for question in ("is this liver ?", "many cells or few ?", QUESTION):
        if turns:
            messages.append({"role": "user", "content": question})
        reply = ask(client, messages).choices[0].message.content
        assert reply == "".join(clover.stream(features, turns, question)).strip()
        turns.append((question, reply))
        messages.append({"role": "assistant", "content": reply})


def test_a_new_image_begins_a_new_conversation(
    client: openai.OpenAI, clover: Clover, parts: tuple[Tiny, Path]
) -> None:
    first, second = parts[0].image("liver"), parts[0].image("colon")
    messages = [
        seen(QUESTION, data_uri(first)),
        {"role": "assistant", "content": "liver"},
        seen(QUESTION, data_uri(second)),
    ]
    assert ask(client, messages).choices[0].message.content == clover.ask(second, QUESTION).text


def test_several_answers_with_seeds_stops_and_scores(
    client: openai.OpenAI, clover: Clover, parts: tuple[Tiny, Path]
) -> None:
    path = parts[0].image()
    messages = [seen(QUESTION, data_uri(path))]
    warm = ask(client, messages, n=3, temperature=1.5, seed=4, max_tokens=8)
    texts = [choice.message.content for choice in warm.choices]
    expected = [
        clover.ask(
            path, QUESTION, settings=GenerationSettings(temperature=1.5, max_tokens=8, seed=4 + i)
        ).text
        for i in range(3)
    ]
    assert texts == expected and len(set(texts)) > 1
    scored = ask(client, messages, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [item.logprob for item in scored] == [item.top_logprobs[0].logprob for item in scored]
    whole = ask(client, messages, max_tokens=12).choices[0].message.content
    stop = whole.split()[2]
    stopped = ask(client, messages, max_tokens=12, stop=[stop]).choices[0]
    assert stopped.message.content == whole[: whole.index(stop)].strip()
    assert stopped.finish_reason == "stop"


def test_tiny_temperature_and_top_p_are_answered_as_their_limits(
    client: openai.OpenAI, clover: Clover, parts: tuple[Tiny, Path]
) -> None:
    path = parts[0].image()
    for tiny in ({"temperature": 1e-40}, {"temperature": 1, "top_p": 1e-46}):
        reply = ask(client, [seen(QUESTION, data_uri(path))], **tiny)
        assert reply.choices[0].message.content == clover.ask(path, QUESTION).text


def test_a_system_message_is_read_before_the_question(
    client: openai.OpenAI, clover: Clover, parts: tuple[Tiny, Path]
) -> None:
    path = parts[0].image()
    prefix = clover.visual_prefix(clover.encode(path), [QUESTION])
    expected = clover.language.generate(
        prefix, [f"many cells\n{QUESTION}"], clover.default_settings()
    )
    messages = [{"role": "system", "content": "many cells"}, seen(QUESTION, data_uri(path))]
    assert ask(client, messages).choices[0].message.content == expected[0].strip()


def test_embeddings_are_stage_1s_unit_vectors(
    client: openai.OpenAI,
    clover: Clover,
    alignment: tuple[Path, Bridge],
    parts: tuple[Tiny, Path],
) -> None:
    path, bridge = parts[0].image(), alignment[1]
    text = "the image shows liver"
    reply = client.embeddings.create(model="tiny", input=[text, data_uri(path)])
    with torch.no_grad():
        tokens = clover.tokenizer([text], limit=clover.recipe.align.max_text_tokens)
        row = bridge.qformer.encode_text(tokens.ids, tokens.mask)[:, 0]
        keys = bridge.read_image(clover.encode(path))
        seen_by = bridge.alignment.embed_image(bridge.qformer.encode_queries(keys).hidden)[0]
        mean = seen_by.mean(dim=0)
        expected = [bridge.alignment.embed_text(row)[0], mean / mean.norm()]
    for item, vector in zip(reply.data, expected, strict=True):
        assert item.embedding == pytest.approx(vector.tolist(), abs=1e-5)
    plain = client.embeddings.create(model="tiny", input=text, encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(reply.data[0].embedding, abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="start the server with --align FILE"):
        client.embeddings.create(model="other", input=text)
    with pytest.raises(openai.BadRequestError, match="dimensions is 3, these embeddings have 16"):
        client.embeddings.create(model="tiny", input=text, dimensions=3)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "audio"),
    ({"messages": [seen("", "IMAGE")]}, "the question is empty"),
    ({"messages": [seen("what ?", *["IMAGE"] * 20)]}, "20 images in one message"),
    ({"messages": [seen("what ?", "data:image/png;base64,@@@")]}, "base64 is broken"),
    ({"messages": [seen("what ?", "data:text/plain;base64,YQ==")]}, "is not an image"),
    ({"messages": [seen("what ?", "data:image/png;base64,YWJj")]}, "none of PNG, JPEG"),
    ({"messages": [seen("what ?", "http://127.0.0.1/a.png")]}, "--allow-image-urls"),
    ({"messages": [seen("what ?", "file:///etc/passwd")]}, "--allow-image-urls"),
    ({"messages": [seen("what ?", "IMAGE"), {"role": "assistant", "content": "a"}]}, "end with a"),
    ({"messages": [seen("what ?", "IMAGE")], "max_tokens": 5000}, "at most 1024"),
    ({"messages": [seen("what ?", "IMAGE")], "max_tokens": 400}, "more than the model's 256"),
    ({"messages": [seen("what ?", "IMAGE")], "temperature": 9}, "temperature"),
    ({"messages": [seen("what ?", "IMAGE")], "tools": [{"a": 1}]}, "tools is not supported"),
    *(
        ({"messages": [seen("what ?", "IMAGE")], "extra_body": {name: value}}, message)
        for name, value, message in [
            ("top_k", 1, "top_k is not supported here; leave it out"),
            ("repetition_penalty", 1.5, "repetition_penalty is not supported"),
            ("tool_choice", "required", "tool_choice is not supported"),
            ("guided_json", {}, "guided_json is not supported"),
            ("best_of", 4, "best_of is not supported"),
            ("reasoning_effort", "high", "reasoning_effort is not supported"),
            ("max_token", 5, "unknown field 'max_token'; did you mean 'max_tokens'?"),
            ("temprature", 1, "unknown field 'temprature'; did you mean 'temperature'?"),
        ]
    ),
    (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "a"}]}]},
        "tool_calls of a message is not read",
    ),
    ({"messages": [seen("what ?", "IMAGE")], "n": 1000}, "n: "),
    ({"messages": [{"role": "user", "content": "liver"}]}, "no chat template"),
    ({"messages": [{"role": "user", "content": "a" * 200_001}]}, "200,001 characters, at most"),
]


@pytest.mark.parametrize(("body", "message"), BAD, ids=[message for _, message in BAD])
def test_a_mistake_is_one_line_in_the_shape_of_openai(
    client: openai.OpenAI, parts: tuple[Tiny, Path], body: dict[str, Any], message: str
) -> None:
    text = json.dumps(body).replace("IMAGE", data_uri(parts[0].image()))
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", **json.loads(text))
    assert message in refused.value.message
    body_of_error: Any = refused.value.body
    assert body_of_error["type"] == "invalid_request_error"
    if "extra_body" in body:
        assert body_of_error["param"] == next(iter(body["extra_body"]))
    assert "Traceback" not in refused.value.response.text
    assert "\n" not in body_of_error["message"]


def test_fields_that_change_no_answer_are_accepted(
    client: openai.OpenAI, clover: Clover, parts: tuple[Tiny, Path]
) -> None:
    path = parts[0].image()
    reply = ask(
        client,
        [seen(QUESTION, data_uri(path))],
        user="somebody",
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="x",
        parallel_tool_calls=False,
        tools=[],
        tool_choice="none",
        logit_bias={},
        modalities=["text"],
        extra_body={"top_k": -1, "repetition_penalty": 1.0, "best_of": None},
    )
    assert reply.choices[0].message.content == clover.ask(path, QUESTION).text


def test_every_field_of_the_official_client_is_known() -> None:
    from openai.types import EmbeddingCreateParams
    from openai.types.chat import completion_create_params as chat

    offered = set(chat.CompletionCreateParamsNonStreaming.__annotations__)
    offered |= set(chat.CompletionCreateParamsBase.__annotations__)
    assert len(offered) > 30
    assert offered <= set(ChatRequest.model_fields) | wire._HARMLESS | set(wire._OFF)
    embedding = set(EmbeddingCreateParams.__annotations__)
    assert embedding <= set(EmbeddingRequest.model_fields) | wire._HARMLESS


def test_each_model_embeds_with_its_own_stage_1(
    parts: tuple[Tiny, Path], alignment: tuple[Path, Bridge], tmp_path: Path
) -> None:
    own = shutil.copytree(parts[1], tmp_path / "own")
    shutil.copy(alignment[0], own / "align.safetensors")
    served = load_served([("plain", parts[1]), ("own", own)], device="cpu", precision="float32")
    settings = ServeSettings()
    engine = Engine(served, settings)
    with TestClient(create_app(engine, settings), base_url="http://127.0.0.1") as asking:
        replies = [
            asking.post("/v1/embeddings", json={"model": name, "input": "liver"})
            for name in ("own", "plain")
        ]
    engine.close()
    assert [reply.status_code for reply in replies] == [200, 400]
    assert len(replies[0].json()["data"][0]["embedding"]) == 16
    assert "'plain' has no embeddings" in replies[1].json()["error"]["message"]


def test_an_embedding_request_with_an_unknown_field_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean 'dimensions'"):
        client.embeddings.create(model="tiny", input="a", extra_body={"dimension": 3})


def test_too_many_at_once_are_told_to_come_again_and_the_rest_is_answered(
    server: Running, client: openai.OpenAI, parts: tuple[Tiny, Path]
) -> None:
    messages = [seen(QUESTION, data_uri(parts[0].image()))]
    before = ask(client, messages).choices[0].message.content

    def flood(_: int) -> str:
        try:
            return str(ask(client, messages, n=4).choices[0].message.content)
        except openai.RateLimitError as error:
            assert int(error.response.headers["retry-after"]) >= 1
            return "busy"

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(flood, range(24)))
    assert set(answers) == {"busy", before}


def raw(server: Running, text: bytes, *, wait: float = 10.0) -> bytes:
    """Send bytes, return what comes back until the server closes or is silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as connection:
        connection.sendall(text)
        parts = []
        try:
            while part := connection.recv(65536):
                parts.append(part)
                if b"\r\n\r\n" in b"".join(parts) and b"}" in part:
                    break
        except TimeoutError:
            pass
        return b"".join(parts)


def test_other_sites_may_not_ask(server: Running) -> None:
    def head(*lines: str) -> bytes:
        return raw(server, ("\r\n".join(["GET /v1/models HTTP/1.1", *lines]) + "\r\n\r\n").encode())

    own = f"Host: 127.0.0.1:{server.port}"
    assert head(own).startswith(b"HTTP/1.1 200")
    # A name of somebody else's that points here (DNS rebinding), and a page of another site.
    assert head("Host: evil.example").startswith(b"HTTP/1.1 403")
    assert head(own, "Origin: https://evil.example").startswith(b"HTTP/1.1 403")
    assert head(own, "Origin: null").startswith(b"HTTP/1.1 403")
    reply = head(own, f"Origin: http://127.0.0.1:{server.port}")
    assert reply.startswith(b"HTTP/1.1 200")
    assert b"access-control-allow-origin" not in reply.lower()


def test_a_body_that_is_too_long_is_refused_before_it_is_read(server: Running) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 99999999\r\n\r\n"
    reply = raw(server, head.encode())
    assert reply.startswith(b"HTTP/1.1 413")
    assert b"more than 20,971,520 bytes" in reply


def test_a_client_that_leaves_is_not_written_for(
    server: Running, client: openai.OpenAI, parts: tuple[Tiny, Path]
) -> None:
    def figure(name: str) -> float:
        text = client.get("/../metrics", cast_to=str)
        line = next(line for line in text.splitlines() if line.startswith(name + " "))
        return float(line.split()[1])

    before = figure('clover_answers_total{result="cancelled"}')
    body = {
        "model": "tiny",
        "messages": [seen(QUESTION, data_uri(parts[0].image()))],
        "max_tokens": 200,
        "n": 4,
        "temperature": 2,
    }
    text = json.dumps(body)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall((head + text).encode())
    deadline = time.monotonic() + 30
    while figure("clover_running_answers") or figure("clover_waiting_answers"):
        assert time.monotonic() < deadline, "answers nobody waits for are still being written"
        time.sleep(0.05)
    assert figure('clover_answers_total{result="cancelled"}') > before


def test_off_loopback_a_token_is_required_and_checked(parts: tuple[Tiny, Path]) -> None:
    command = [sys.executable, "-m", "clover.cli", "serve", str(parts[1]), "--host", "0.0.0.0"]
    refused = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert refused.returncode == 2
    assert "a token is required: set CLOVER_TOKEN" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_the_token_is_asked_for_and_sigterm_lets_an_answer_finish(
    parts: tuple[Tiny, Path],
) -> None:
    with running(str(parts[1]), CLOVER_TOKEN="s3cret") as server:
        wrong = openai.OpenAI(base_url=server.url + "/v1", api_key="no", max_retries=0)
        right = openai.OpenAI(base_url=server.url + "/v1", api_key="s3cret", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="token is absent or wrong"):
            wrong.models.list()
        messages: Any = [seen(QUESTION, data_uri(parts[0].image()))]
        stream = right.chat.completions.create(
            model="tiny", messages=messages, stream=True, max_tokens=150, temperature=2
        )
        iterator = iter(stream)
        next(iterator)
        server.process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in iterator]
        assert reasons[-1] in ("stop", "length")
        assert server.process.wait(timeout=60) == 0
        wrong.close()
        right.close()


def test_a_port_in_use_is_one_line(server: Running, parts: tuple[Tiny, Path]) -> None:
    command = [sys.executable, "-m", "clover.cli", "serve", str(parts[1])]
    refused = subprocess.run(
        [*command, "--port", str(server.port)], capture_output=True, text=True, env=environment()
    )
    assert refused.returncode == 2
    assert (
        refused.stderr
        == f"clover: port {server.port} is taken; choose another, or 0 for a free one\n"
    )


def test_models_of_unlike_precision_are_refused_in_one_line_and_served_in_one_format(
    parts: tuple[Tiny, Path], tmp_path: Path
) -> None:
    other = shutil.copytree(parts[1], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    assert config["recipe"]["precision"] == "float32"
    config["recipe"]["precision"] = "bfloat16"
    (other / "config.json").write_text(json.dumps(config))
    models = [str(parts[1]), f"other={other}"]
    command = [sys.executable, "-m", "clover.cli", "serve", *models, "--port", "0"]
    refused = subprocess.run(
        [*command, "--device", "cpu"], capture_output=True, text=True, env=environment()
    )
    assert refused.returncode == 2
    assert refused.stderr == (
        f"clover: {parts[1]} has precision float32, {other} has precision bfloat16, and models "
        "that are served together share one language model; give --precision float32 or "
        "--precision bfloat16 for all of them\n"
    )
    with running(*models, "--precision", "float32") as server:
        assert "other: tiny/patches, bridge of" in server.banner
        listed = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").models.list()
        assert "other" in [model.id for model in listed]


EARLY = """
import os, signal, sys
import uvicorn
from clover.cli import main
run = uvicorn.Server.run
def early(self, *given, **named):
    os.kill(os.getpid(), signal.SIGTERM)
    return run(self, *given, **named)
uvicorn.Server.run = early
main(sys.argv[1:])
"""


def test_a_signal_before_the_server_listens_for_it_is_obeyed(parts: tuple[Tiny, Path]) -> None:
    command = [sys.executable, "-c", EARLY, "serve", str(parts[1]), "--port", "0"]
    ended = subprocess.run(
        [*command, "--device", "cpu"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,  # no verdict on speed: unheard, it would serve for ever
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("stopped\n")


@pytest.mark.parametrize(("is_fast", "refusal"), [(True, "auto (bfloat16 here)"), (False, None)])
def test_auto_is_the_format_it_means_here(
    parts: tuple[Tiny, Path], monkeypatch: pytest.MonkeyPatch, is_fast: bool, refusal: str | None
) -> None:
    monkeypatch.setattr("clover.training.device.multiplies_bfloat16_fast", lambda: is_fast)
    recipe = parts[0].recipe
    recipes = {Path("a"): recipe, Path("b"): recipe.model_copy(update={"precision": "auto"})}
    if refusal is None:
        _check_formats(recipes, "cpu")
        return
    with pytest.raises(CloverError) as error:
        _check_formats(recipes, "cpu")
    assert str(error.value).startswith(f"a has precision float32, b has precision {refusal}, and")


NODE = """
const OpenAI = require("openai");
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const image = process.argv[3];
const content = [{ type: "text", text: "describe the image" },
                 { type: "image_url", image_url: { url: image } }];
(async () => {
  const messages = [{ role: "user", content }];
  const models = (await client.models.list()).data.map((m) => m.id);
  const whole = await client.chat.completions.create({ model: "tiny", messages });
  const answer = whole.choices[0].message.content;
  let streamed = "";
  for await (const chunk of await client.chat.completions.create(
      { model: "tiny", messages, stream: true })) streamed += chunk.choices[0].delta.content ?? "";
  const again = await client.chat.completions.create({ model: "tiny", messages: [
      ...messages, { role: "assistant", content: answer }, { role: "user", content: "what ?" }] });
  const words = { model: "tiny", messages: [{ role: "user", content: "what is fibrosis ?" }],
                  max_tokens: 8, seed: 3 };
  const plain = await client.chat.completions.create(words);
  let plainStreamed = "";
  for await (const chunk of await client.chat.completions.create({ ...words, stream: true }))
    plainStreamed += chunk.choices[0].delta.content ?? "";
  let status = 0, message = "";
  try { await client.chat.completions.create({ model: "none", messages }); }
  catch (error) { status = error.status; message = error.message; }
  console.log(JSON.stringify({ models, answer, streamed,
      again: again.choices[0].message.content, plain: plain.choices[0].message.content.trim(),
      plainStreamed: plainStreamed.trim(), plainTokens: plain.usage.completion_tokens,
      status, message }));
})();
"""


NODE_OPENAI = "6.30.1"
"""Of npm's `openai`: the last line that Node 20 runs; it has no dependencies."""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_official_client_of_node_is_served(tmp_path: Path) -> None:
    tiny, model = tiny_folder(tmp_path)
    # A model that can also be talked with without an image.
    settings = tiny.folder / "llama" / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    settings.write_text(json.dumps(read_json(settings) | {"chat_template": template}))
    path, clover = tiny.image(), load(model)
    modules = fetched("openai", NODE_OPENAI).parent
    script = tmp_path / "ask.js"
    script.write_text(NODE)
    with running(f"tiny={model}", f"other={model}") as server:
        done = subprocess.run(
            ["node", str(script), server.url + "/v1", data_uri(path)],
            capture_output=True,
            text=True,
            env={**os.environ, "NODE_PATH": str(modules)},
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = clover.ask(path, QUESTION).text
    assert found["models"] == ["tiny", "other"]
    assert found["answer"] == expected
    assert found["streamed"].strip() == expected
    turn = "".join(clover.stream(clover.encode(path), [(QUESTION, expected)], "what ?")).strip()
    assert found["again"] == turn
    # Without an image the frozen language model answers, sampled: a seed gives it again.
    assert found["plain"] == found["plainStreamed"] and found["plainTokens"] > 0
    assert found["status"] == 404
    assert "no model 'none'" in found["message"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_is_served(server: Running, clover: Clover, parts: tuple[Tiny, Path]) -> None:
    body = {"model": "tiny", "messages": [seen(QUESTION, data_uri(parts[0].image()))]}
    address, kind = server.url + "/v1/chat/completions", "Content-Type: application/json"
    done = subprocess.run(
        ["curl", "-s", address, "-H", kind, "-d", "@-"],
        input=json.dumps(body),
        capture_output=True,
        text=True,
    )
    reply = json.loads(done.stdout)
    assert reply["choices"][0]["message"]["content"] == clover.ask(parts[0].image(), QUESTION).text
