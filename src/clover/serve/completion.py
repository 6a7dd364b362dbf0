"""One chat completion: from a request's messages to a question, and from events to a reply.

A conversation is about one picture: the last message that carries an image begins it, the messages
after it are its turns, and what was said before is about another picture and is not read. Without
any image the frozen language model answers by its own chat template.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import random
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from clover.core.errors import CloverError
from clover.language.decoder_only import DecoderOnly
from clover.language.protocol import GenerationSettings
from clover.language.rows import can_share_a_batch
from clover.model import check_question
from clover.serve.engine import Engine
from clover.serve.picture import data_uri_bytes, open_stranger
from clover.serve.remote import fetch_image
from clover.serve.request import Begun, Picture, Question, Served
from clover.serve.running import LeftError, Running
from clover.serve.settings import ServeSettings
from clover.serve.wire import (
    ChatMessage,
    ChatRequest,
    Reply,
    choice,
    delta,
    error_body,
    usage_body,
)
from clover.serve.writing import TokenScore

_TEXT_TOKENS = 512
"""Longest answer without an image, unless the request says otherwise."""
_DONE = b"data: [DONE]\n\n"


async def answer(request: Request, body: ChatRequest) -> Response:
    """Answer a chat request, whole or streamed.

    Raises:
        CloverError: a mistake of the client's.
        HTTPException: no such model.
    """
    engine: Engine = request.app.state.engine
    settings: ServeSettings = request.app.state.settings
    served = engine.models.get(body.model)
    if served is None:
        names = ", ".join(engine.models)
        raise HTTPException(404, f"no model '{body.model[:80]}'; served here: {names}")
    question = await read_question(request, body, served)
    running: Running = request.app.state.start(question)
    watch = asyncio.create_task(running.watch(request))
    try:
        async with asyncio.timeout(settings.answer_seconds):
            begun = await running.begin()
        if body.stream:
            stream = _stream(running, begun, body, watch, settings.answer_seconds)
            return StreamingResponse(stream, media_type="text/event-stream", headers=_STREAM)
        async with asyncio.timeout(settings.answer_seconds):
            return JSONResponse(await _whole(running, begun, body))
    except LeftError:
        return Response(status_code=499)
    finally:
        if not body.stream or running.has_failed:
            running.stop(watch)


_STREAM = {"cache-control": "no-store", "x-accel-buffering": "no"}


async def read_question(request: Request, body: ChatRequest, served: Served) -> Question:
    """Return what a chat request asks.

    Raises:
        CloverError: messages in an order or of a kind that is not read here.
    """
    settings: ServeSettings = request.app.state.settings
    engine: Engine = request.app.state.engine
    length = sum(len(message.text) for message in body.messages)
    if length > settings.max_text:
        raise CloverError(
            f"the conversation has {length:,} characters, at most {settings.max_text:,} are read"
        )
    first = max((i for i, message in enumerate(body.messages) if message.images), default=None)
    common: dict[str, Any] = {
        "seeds": _seeds(body),
        "stops": body.stops,
        "num_top": body.num_top,
    }
    if first is None:
        if not isinstance(served.language, DecoderOnly):
            raise CloverError(f"'{served.name}' wants an image; send one as an image_url part")
        messages = tuple(message.plain() for message in body.messages)
        written = _settings(body, settings, GenerationSettings(max_tokens=_TEXT_TOKENS))
        if body.temperature is None:
            written = replace(written, temperature=1.0)
        _check_reachable(body, written, served)
        schema = await _schema(engine, body)
        return Question(served.name, written, messages=messages, schema=schema, **common)
    if served.clover is None:
        raise CloverError(f"'{served.name}' reads text alone; leave the image out")
    system, turns, question = conversation(body.messages, first)
    address = body.messages[first].images
    if len(address) > 1:
        raise CloverError(f"{len(address)} images in one message; one is read at a time")
    default = served.clover.default_settings()
    written = _settings(body, settings, default)
    _check_reachable(body, written, served)
    schema = await _schema(engine, body)
    picture = await read_picture(request, address[0], served)
    return Question(
        served.name,
        written,
        question=question,
        picture=picture,
        turns=tuple(turns),
        system=system,
        schema=schema,
        **common,
    )


def conversation(
    messages: Sequence[ChatMessage], first: int
) -> tuple[str, list[tuple[str, str]], str]:
    """Return system text, earlier (question, answer) pairs, and the question to be answered.

    Args:
        messages: All of them.
        first: Which one carries the picture.

    Raises:
        CloverError: the last word is not the user's, or a question is empty.
    """
    system = "\n".join(m.text for m in messages if m.role in ("system", "developer")).strip()
    if messages[first].role != "user":
        raise CloverError(f"an image stands in a message of the {messages[first].role}, not a user")
    turns: list[tuple[str, str]] = []
    asked: list[str] = []
    for message in messages[first:]:
        if message.role == "user":
            asked.append(message.text)
        elif message.role == "assistant":
            turns.append((_question(asked), message.text.strip()))
            asked = []
    if not asked:
        raise CloverError("the last message is the assistant's; end with a question of the user's")
    return system, turns, _question(asked)


def _question(asked: Sequence[str]) -> str:
    return check_question("\n".join(text.strip() for text in asked if text.strip()))


def _seeds(body: ChatRequest) -> tuple[int, ...]:
    first = body.seed if body.seed is not None else random.randrange(1 << 31)
    return tuple(first + index for index in range(body.n or 1))


async def _schema(engine: Engine, body: ChatRequest) -> Any:
    schema = body.response_format.schema_of_reply if body.response_format else None
    if schema is None:
        return None
    if len(json.dumps(schema)) > 1 << 16:
        raise CloverError("the JSON schema has more than 65,536 characters; send a shorter one")
    return await asyncio.wrap_future(engine.compile_schema(schema))


def _settings(
    body: ChatRequest, limits: ServeSettings, default: GenerationSettings
) -> GenerationSettings:
    asked = body.max_completion_tokens or body.max_tokens
    if asked is not None and asked > limits.max_tokens:
        raise CloverError(f"max_tokens is {asked}, at most {limits.max_tokens} are written here")
    longest = asked or min(default.max_tokens, limits.max_tokens)
    temperature = default.temperature if body.temperature is None else body.temperature
    return replace(
        default,
        max_tokens=longest,
        min_tokens=min(default.min_tokens, longest),
        temperature=temperature,
        top_p=default.top_p if body.top_p is None else body.top_p,
        # Beam search does not sample: who asks for sampling gets sampling.
        num_beams=default.num_beams if temperature == 0 else 1,
    )


def _check_reachable(body: ChatRequest, written: GenerationSettings, served: Served) -> None:
    """Check that the way in which the answer will be written gives what is asked for.

    Raises:
        CloverError: scores or a schema where there are none.
    """
    has_schema = body.response_format is not None and body.response_format.type != "text"
    if written.num_beams > 1 and (body.logprobs or has_schema):
        name = "logprobs" if body.logprobs else "response_format"
        raise CloverError(
            f"{name} does not go with beam search, and '{served.name}' searches with "
            f"{written.num_beams} beams; set a temperature above 0, which samples, or leave it out"
        )
    if body.logprobs and not can_share_a_batch(served.language):
        raise CloverError(
            f"logprobs are not known of '{served.name}': it is an encoder-decoder or has sliding "
            "windows; leave them out"
        )


async def read_picture(request: Request, address: str, served: Served) -> Picture:
    """Return the picture at an address, decoded only if its features are not kept.

    Raises:
        CloverError: it is not allowed, not there, or not an image.
    """
    settings: ServeSettings = request.app.state.settings
    engine: Engine = request.app.state.engine
    if address[:5].lower() == "data:":
        content = data_uri_bytes(address, max_bytes=settings.max_body_bytes)
    elif not settings.allow_image_urls:
        raise CloverError(
            "addresses of images are not fetched here (--allow-image-urls); send the image itself "
            "as data:image/png;base64,..."
        )
    else:
        fetch = functools.partial(fetch_image, address, max_bytes=settings.max_body_bytes)
        # Not the pool that decodes: slow addresses must not keep others' images waiting.
        pool: ThreadPoolExecutor = request.app.state.fetching
        content = await asyncio.get_running_loop().run_in_executor(pool, fetch)
    sha256 = hashlib.sha256(content).hexdigest()
    kept = engine.kept_features(served, sha256)
    if kept is not None:
        return Picture(sha256, features=kept)
    clover = served.clover
    assert clover is not None, "only a model that sees reads pictures"

    def decode() -> Any:
        return clover.encoder.prepare(open_stranger(content, max_pixels=settings.max_pixels))

    async with request.app.state.decoding:
        return Picture(sha256, pixels=await asyncio.to_thread(decode))


async def _whole(running: Running, begun: Begun, body: ChatRequest) -> dict[str, Any]:
    count = len(running.question.seeds)
    texts = [""] * count
    reasons: list[str | None] = [None] * count
    scores: list[list[TokenScore]] = [[] for _ in range(count)]
    written = 0
    async for piece in running.pieces():
        texts[piece.answer] += piece.text
        reasons[piece.answer] = piece.finish_reason
        scores[piece.answer] += piece.scores
        written += piece.num_tokens
    choices = []
    for index in range(count):
        scored = scores[index] if body.logprobs else None
        choices.append(choice(index, texts[index].strip(), reasons[index], scored))
    usage = usage_body(begun.prompt_tokens, begun.reused_tokens, written)
    return Reply(body.model, begun.note).whole(choices, usage)


async def _stream(
    running: Running,
    begun: Begun,
    body: ChatRequest,
    watch: asyncio.Task[None],
    seconds: float,
) -> AsyncIterator[bytes]:
    """Yield server-sent events; a client that leaves, or reads too slowly, ends the writing."""
    reply, written = Reply(body.model, begun.note), 0
    try:
        async with asyncio.timeout(seconds):
            for index in range(len(running.question.seeds)):
                yield _event(reply.chunk([delta(index, {"role": "assistant", "content": ""})]))
            async for piece in running.pieces():
                written += piece.num_tokens
                scores = piece.scores if body.logprobs else None
                if piece.text or scores:
                    content = {"content": piece.text}
                    yield _event(reply.chunk([delta(piece.answer, content, None, scores)]))
                if piece.finish_reason is not None:
                    yield _event(reply.chunk([delta(piece.answer, {}, piece.finish_reason)]))
            if body.stream_options is not None and body.stream_options.include_usage:
                usage = usage_body(begun.prompt_tokens, begun.reused_tokens, written)
                yield _event(reply.chunk([], usage=usage))
            yield _DONE
    except LeftError:
        pass
    except TimeoutError:
        yield _event(error_body(408, f"the answer was not ready in {seconds:g} s"))
    except CloverError as error:
        yield _event(error_body(400, str(error)))
    except Exception:
        # The engine has logged it; the status is sent, so that this is all one can still say.
        yield _event(error_body(500, "the server failed; its log says why"))
    finally:
        running.stop(watch)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
