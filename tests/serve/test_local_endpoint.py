"""The local endpoint, driven by the official client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from tests.language.test_constraint import PAIRS, byte_llama
from tests.language.tiny import tiny_llama

from clover.core.errors import CloverError
from clover.language.decoder_only import DecoderOnly
from clover.serve.local_endpoint import serve_language_model


@pytest.fixture(scope="module")
def language() -> DecoderOnly:
    return tiny_llama()


@pytest.fixture(scope="module")
def client(language: DecoderOnly) -> Iterator[openai.OpenAI]:
    with serve_language_model(language, "tiny", max_batch=4) as url:
        assert url.startswith("http://127.0.0.1:")
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
            yield client


def ask(client: openai.OpenAI, text: str, seed: int = 0) -> str:
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": text}],
        max_tokens=6,
        temperature=1.0,
        seed=seed,
    )
    return reply.choices[0].message.content or ""


def test_the_model_list_names_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_completion_carries_text_and_usage(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "is there necrosis ?"}],
        max_tokens=5,
        temperature=0,
    )
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 6
    assert 1 <= reply.usage.completion_tokens <= 5
    assert reply.usage.total_tokens == 6 + reply.usage.completion_tokens


def test_concurrent_requests_answer_as_they_would_alone(client: openai.OpenAI) -> None:
    texts = ["what tissue", "describe the image", "is there fibrosis ?", "liver", "colon", "yes"]
    alone = [ask(client, text, seed) for seed, text in enumerate(texts)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda item: ask(client, item[1], item[0]), enumerate(texts)))
    assert together == alone


def test_mistakes_come_back_in_the_shape_of_openai(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="tiny", messages=[])
    with pytest.raises(openai.BadRequestError, match="more than the model's 128"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "liver"}], max_tokens=1000
        )


@pytest.fixture(scope="module")
def writer() -> Iterator[openai.OpenAI]:
    """A model that can write JSON, because its tokens are bytes."""
    pytest.importorskip("llguidance", reason="the extra [structured] is not installed")
    with (
        serve_language_model(byte_llama(), "bytes", max_batch=4) as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


def write(client: openai.OpenAI, response_format: dict | None, seed: int = 0) -> str:
    reply = client.chat.completions.create(
        model="bytes",
        messages=[{"role": "user", "content": f"caption {seed}"}],
        max_tokens=400,
        temperature=1.5,
        seed=seed,
        **({} if response_format is None else {"response_format": response_format}),  # type: ignore[call-overload]
    )
    return reply.choices[0].message.content or ""


def wrapped(schema: dict) -> dict:
    named = {"name": "pairs", "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": named}


def test_replies_are_held_to_the_schema_of_their_own_request(writer: openai.OpenAI) -> None:
    word = {"type": "string", "enum": ["liver", "colon"]}
    forms = [wrapped(PAIRS), wrapped(word), None, wrapped(PAIRS), wrapped(word), wrapped(PAIRS)]
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda item: write(writer, item[1], item[0]), enumerate(forms)))
    for text, form in zip(texts, forms, strict=True):
        if form is None:
            with pytest.raises(ValueError):
                json.loads(text)
        elif form["json_schema"]["schema"] is word:
            assert json.loads(text) in ("liver", "colon")
        else:
            assert 2 <= len(json.loads(text)["pairs"]) <= 3


def test_text_is_no_constraint_and_a_schema_with_a_fault_is_a_bad_request(
    writer: openai.OpenAI,
) -> None:
    assert write(writer, {"type": "text"}) == write(writer, None)
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        write(writer, wrapped({"type": "array", "uniqueItems": True}))
    with pytest.raises(openai.BadRequestError, match="has no json_schema"):
        write(writer, {"type": "json_schema"})
    with pytest.raises(openai.BadRequestError, match="response_format"):
        write(writer, {"type": "poem"})


def test_a_port_that_is_taken_is_named(language: DecoderOnly) -> None:
    with serve_language_model(language, "tiny") as url:
        port = int(url.split(":")[2].removesuffix("/v1"))
        with pytest.raises(CloverError, match=f"port {port} is taken"):  # noqa: SIM117
            with serve_language_model(language, "tiny", port=port):
                pass


def test_the_endpoint_is_gone_after_its_context(language: DecoderOnly) -> None:
    with serve_language_model(language, "tiny") as url:
        pass
    started = time.monotonic()
    with (
        openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=5) as client,
        pytest.raises(openai.APIConnectionError),
    ):
        client.models.list()
    assert time.monotonic() - started < 5
