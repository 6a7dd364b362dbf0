"""The local endpoint, driven by the official client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from tests.language.tiny import tiny_llama

from clover.language.decoder_only import DecoderOnly
from clover.language.protocol import GenerationSettings
from clover.serve.local_endpoint import Batcher, serve_language_model


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


def test_requests_that_wait_together_share_a_batch(language: DecoderOnly) -> None:
    batcher = Batcher(language, max_batch=4)
    settings = GenerationSettings(max_tokens=4)
    messages = [{"role": "user", "content": "liver"}]
    futures = [batcher.submit(messages, settings, seed) for seed in range(8)]
    for future in futures:
        future.result(timeout=30)
    batcher.close()
    assert sum(batcher.batch_sizes) == 8
    assert max(batcher.batch_sizes) == 4


def test_mistakes_come_back_in_the_shape_of_openai(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="tiny", messages=[])
    with pytest.raises(openai.BadRequestError, match="more than the model's 128"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "liver"}], max_tokens=1000
        )


def test_one_bad_request_does_not_fail_its_neighbours(language: DecoderOnly) -> None:
    batcher = Batcher(language, max_batch=4)
    settings = GenerationSettings(max_tokens=4)
    good = [{"role": "user", "content": "liver"}]
    bad = [{"role": "user", "content": "liver " * 200}]
    futures = [batcher.submit(item, settings, 0) for item in (good, bad, good)]
    assert futures[0].result(timeout=30) == futures[2].result(timeout=30)
    with pytest.raises(Exception, match="more than the model's 128"):
        futures[1].result(timeout=30)
    batcher.close()


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
