"""An OpenAI-compatible endpoint on this machine, over the frozen language model.

In: a language model. Out: a base URL that any OpenAI client can talk to while the context lasts.
The demo generates instructions through it, so that the path to a large remote model is the path
that is tested. Requests that arrive together are answered as one batch. A request with a JSON
schema (`response_format`) is held to it token by token.

`python -m clover.serve.local_endpoint` serves a recipe's language model until it is stopped.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, model_validator

from clover.core.errors import CloverError
from clover.language.chat import ChatReply, complete
from clover.language.constraint import CompiledSchema, Schema, SchemaCompiler
from clover.language.decoder_only import DecoderOnly
from clover.language.protocol import GenerationSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

_GATHER_SECONDS = 0.02
"""How long the first request of a batch waits for company."""
_LOG = logging.getLogger(__name__)


class TextPart(BaseModel):
    """One text part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "developer"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """Return the message as the chat template reads it."""
        text = self.content
        if not isinstance(text, str):
            text = "\n".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class NamedSchema(BaseModel):
    """A JSON schema as OpenAI's clients wrap it; it is always held to, `strict` or not."""

    name: str = "reply"
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What form a reply must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format json_schema has no json_schema; give one")
        return self

    @property
    def schema_of_reply(self) -> Schema | None:
        """The schema to hold a reply to; none for text."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else {"type": "object"}


class ChatRequest(BaseModel):
    """The part of OpenAI's chat completion request that is understood here."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    n: Literal[1] = 1
    stream: Literal[False] = False
    response_format: ResponseFormat | None = None

    def settings(self) -> GenerationSettings:
        """Return what requests must share to be answered in one batch."""
        return GenerationSettings(
            max_tokens=self.max_completion_tokens or self.max_tokens or 512,
            temperature=self.temperature,
            top_p=self.top_p,
        )


@dataclass(frozen=True)
class _Job:
    messages: list[dict[str, str]]
    settings: GenerationSettings
    seed: int
    schema: CompiledSchema | None = None
    reply: Future[ChatReply] = field(default_factory=Future)


class Batcher:
    """One thread that answers waiting requests in batches of equal settings."""

    def __init__(self, model: DecoderOnly, max_batch: int) -> None:
        self._model = model
        self._max_batch = max_batch
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="clover-batcher", daemon=True)
        self._thread.start()
        self.batch_sizes: list[int] = []
        self._compiler: SchemaCompiler | None = None

    def submit(
        self,
        messages: list[dict[str, str]],
        settings: GenerationSettings,
        seed: int,
        *,
        schema: Schema | None = None,
    ) -> Future[ChatReply]:
        """Queue one conversation; the future carries its reply or its error.

        Args:
            messages: The conversation.
            settings: How to write; only requests of equal settings share a batch.
            seed: Of sampling.
            schema: A JSON schema that the reply is held to; rows of a batch may differ in it.

        Raises:
            CloverError: the schema, or any schema with this tokenizer, cannot be held to.
        """
        compiled = None if schema is None else self._compile(schema)
        job = _Job(messages, settings, seed, compiled)
        self._waiting.put(job)
        return job.reply

    def _compile(self, schema: Schema) -> CompiledSchema:
        if self._compiler is None:
            self._compiler = SchemaCompiler(self._model.tokens, self._model.vocabulary_size)
        return self._compiler.compile(schema)

    def close(self) -> None:
        """Answer what is running, refuse what still waits, and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        backlog: list[_Job] = []
        is_open = True
        while is_open:
            is_open = self._gather(backlog)
            if not is_open:
                break
            settings = backlog[0].settings
            batch = [job for job in backlog if job.settings == settings][: self._max_batch]
            chosen = {id(job) for job in batch}
            backlog = [job for job in backlog if id(job) not in chosen]
            self._answer([job for job in batch if job.reply.set_running_or_notify_cancel()])
        for job in backlog:
            job.reply.cancel()

    def _gather(self, backlog: list[_Job]) -> bool:
        """Move waiting jobs to the backlog; return False once closed."""
        deadline = time.monotonic() + _GATHER_SECONDS
        while len(backlog) < self._max_batch:
            try:
                left = None if not backlog else max(0.0, deadline - time.monotonic())
                job = self._waiting.get(timeout=left)
            except queue.Empty:
                return True
            if job is None:
                return False
            if not backlog:
                deadline = time.monotonic() + _GATHER_SECONDS
            backlog.append(job)
        return True

    def _answer(self, batch: list[_Job]) -> None:
        if not batch:
            return
        self.batch_sizes.append(len(batch))
        try:
            replies = complete(
                self._model,
                [job.messages for job in batch],
                batch[0].settings,
                seeds=[job.seed for job in batch],
                # Begun here, not when queued: a batch that fails is answered again one by one.
                constraints=[job.schema.begin() if job.schema else None for job in batch],
            )
        except Exception as error:
            if len(batch) > 1:
                # One bad request must not fail its neighbours.
                for job in batch:
                    self._answer([job])
                return
            batch[0].reply.set_exception(error)
            return
        for job, reply in zip(batch, replies, strict=True):
            job.reply.set_result(reply)


def build_app(batcher: Batcher, name: str) -> FastAPI:
    """Return the web application: `/v1/models` and `/v1/chat/completions`."""
    import asyncio

    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    app = FastAPI(title="CLOVER local language model", openapi_url=None)
    created = int(time.time())

    def refuse(status: int, message: str, code: str | None = None) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": None, "code": code}
        return JSONResponse({"error": error}, status_code=status)

    async def explain(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return refuse(400, f"{where}: {first['msg']}")

    async def list_models() -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": created, "owned_by": "clover"}
        return {"object": "list", "data": [entry]}

    async def chat(body: ChatRequest) -> Any:
        if body.model != name:
            return refuse(404, f"no model '{body.model}'; this is '{name}'", "model_not_found")
        seed = body.seed if body.seed is not None else random.randrange(1 << 31)
        messages = [message.plain() for message in body.messages]
        try:
            schema = body.response_format.schema_of_reply if body.response_format else None
            future = batcher.submit(messages, body.settings(), seed % (1 << 63), schema=schema)
            reply = await asyncio.wrap_future(future)
        except CloverError as error:
            return refuse(400, str(error))
        except Exception as error:
            _LOG.exception("a chat completion failed")
            return refuse(500, f"{type(error).__name__}: {error}")
        return _completion(name, reply)

    app.add_exception_handler(RequestValidationError, explain)
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    return app


def _completion(name: str, reply: ChatReply) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": reply.text, "refusal": None},
                "logprobs": None,
                "finish_reason": reply.finish_reason,
            }
        ],
        "usage": {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        },
    }


@contextlib.contextmanager
def serve_language_model(
    model: DecoderOnly, name: str = "local", *, max_batch: int = 16, port: int = 0
) -> Iterator[str]:
    """Serve a language model on loopback for as long as the context lasts; yield its base URL.

    Args:
        model: the frozen model.
        name: what clients call it.
        max_batch: requests answered in one batch.
        port: where to listen; 0 takes a free one.

    Raises:
        CloverError: the port is taken.
    """
    import uvicorn

    # Bound before the server starts: the port is ours from here on, and the URL is known.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise CloverError(f"port {port} is taken; choose another, or 0 for a free one") from error
    batcher = Batcher(model, max_batch)
    config = uvicorn.Config(
        build_app(batcher, name), log_level="error", access_log=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listener]}, name="clover-endpoint", daemon=True
    )
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise CloverError("the local endpoint did not start; see the log above")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        batcher.close()
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


def main() -> None:
    """Serve the language model of a recipe on loopback until Ctrl-C."""
    import argparse

    from clover.core.config import load_recipe
    from clover.language.load import load_language_model
    from clover.training.device import choose_device

    parser = argparse.ArgumentParser(prog="python -m clover.serve.local_endpoint")
    parser.add_argument("--recipe", default="phantom", help="whose language model to serve")
    parser.add_argument("--name", default="local", help="what clients call the model")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    options = parser.parse_args()
    try:
        recipe = load_recipe(options.recipe)
        device = choose_device(recipe.device, recipe.precision)
        model = load_language_model(
            recipe.language, recipe.prompt, device=device.device, dtype=device.dtype
        )
        if not isinstance(model, DecoderOnly):
            raise CloverError(f"{model.id} does not chat; name a recipe with a decoder_only model")
        with serve_language_model(model, options.name, port=options.port) as url:
            sys.stdout.write(f"{url} serves '{options.name}'; Ctrl-C stops it\n")
            sys.stdout.flush()
            threading.Event().wait()
    except CloverError as error:
        sys.stderr.write(f"clover: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
