"""The far side: image tokens are computed here, answers are written by a vLLM server.

In: a question. Out: pieces of the far server's answer. The whole prompt goes there as embeddings
(vLLM's `prompt_embeds` of `/v1/completions`, started with `--enable-prompt-embeds`): base64 of what
`torch.save` writes of one tensor `[T, H]`. One frozen language model there serves every adapter.

Exercised against a server of our own that speaks this format; not run against vLLM itself.

Source: https://docs.vllm.ai/en/stable/features/prompt_embeds/
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from starlette.exceptions import HTTPException
from torch import Tensor

from clover.core.endpoint import http_client
from clover.core.errors import CloverError
from clover.serve.engine import Engine
from clover.serve.request import Begun, BusyError, Question
from clover.serve.running import Running
from clover.serve.settings import ServeSettings
from clover.serve.writing import Piece


def encode_embeds(embeds: Tensor) -> str:
    """Return embeddings `[T, H]` as vLLM reads them."""
    buffer = io.BytesIO()
    # A clone: of a view torch.save would write all that it is a view of.
    torch.save(embeds.detach().cpu().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class FarLanguage:
    """A server that writes answers from prompt embeddings."""

    def __init__(self, url: str, *, key: str | None, max_requests: int) -> None:
        from openai import AsyncOpenAI

        self.url = url
        self.client = AsyncOpenAI(
            base_url=url, api_key=key or "none", max_retries=0, http_client=http_client(url)
        )
        self.num_requests, self.max_requests = 0, max_requests
        self._model: str | None = None

    async def model(self) -> str:
        """Return the name of the far server's model: the first it lists."""
        if self._model is None:
            async for entry in await self.client.models.list():
                self._model = entry.id
                break
            else:
                raise HTTPException(502, f"{self.url} lists no model")
        return self._model


class FarRunning(Running):
    """A question that the far server answers."""

    def __init__(self, engine: Engine, question: Question, far: FarLanguage) -> None:
        super().__init__(engine, question)
        self._far = far
        self._task: asyncio.Task[None] | None = None
        self._left = len(question.seeds)
        self._arrived = time.monotonic()

    async def submit(self) -> None:
        """Compute the prompt here, and send it there."""
        question, far = self.question, self._far
        if question.schema is not None or question.num_top is not None:
            raise CloverError(
                "response_format and logprobs are not passed to the language endpoint; "
                "leave them out"
            )
        if question.settings.num_beams > 1:
            raise CloverError(
                "this model's recipe searches with beams, which a language endpoint does not; "
                "ask with a temperature"
            )
        if far.num_requests >= far.max_requests:
            self.engine.counts.refused += 1
            raise BusyError(f"{far.num_requests} answers wait at the language endpoint", 2)
        # Counted before anything is waited for: all that come meanwhile are counted as well.
        far.num_requests += 1
        self._task = asyncio.create_task(self._follow())
        self._task.add_done_callback(self._leave)

    def _leave(self, task: asyncio.Task[None]) -> None:
        """Give the place free; a task that was cancelled may never have begun."""
        self._far.num_requests -= 1
        if task.cancelled():
            self.engine.counts.cancelled += self._left

    async def _follow(self) -> None:
        try:
            engine, question = self.engine, self.question
            embeds = await asyncio.wrap_future(engine.call(engine.prompt_embeds, question))
            note = await asyncio.wrap_future(engine.call(engine.note_of, question))
            await self._read(embeds, note)
        except Exception as error:
            self.engine.counts.failed += 1
            self.events.put_nowait(_told(error, self._far.url))

    async def _read(self, embeds: Tensor, note: str | None) -> None:
        stream: Any = await self._far.client.completions.create(
            **self._body(await self._far.model(), embeds)
        )
        counts = self.engine.counts
        counts.prompt_tokens += len(embeds)
        self.events.put_nowait(Begun(len(embeds), 0, note))
        open_answers = set(range(len(self.question.seeds)))
        async with stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    reason: Literal["stop", "length"] | None = None
                    if choice.finish_reason is not None and choice.index in open_answers:
                        reason = "length" if choice.finish_reason == "length" else "stop"
                        open_answers.remove(choice.index)
                        counts.answers += 1
                        counts.answer_seconds += time.monotonic() - self._arrived
                        self._left -= 1
                    count = 1 if choice.text or reason else 0
                    counts.written_tokens += count
                    piece = Piece(choice.index, choice.text or "", reason, num_tokens=count)
                    self.events.put_nowait(piece)
        if open_answers:
            raise HTTPException(502, f"{self._far.url} broke off in the middle of an answer")

    def _body(self, model: str, embeds: Tensor) -> dict[str, Any]:
        """Return the request to `/v1/completions`."""
        settings, question = self.question.settings, self.question
        language = self.engine.models[question.model].language
        own = {
            "prompt_embeds": encode_embeds(embeds),
            "min_tokens": settings.min_tokens,
            "repetition_penalty": settings.repetition_penalty,
            "stop_token_ids": sorted(language.tokens.stop_ids),
        }
        return {
            "model": model,
            "prompt": "",
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "n": len(question.seeds),
            "seed": question.seeds[0],
            "stop": list(question.stops) or None,
            "stream": True,
            "extra_body": own,
        }

    def stop(self, watch: asyncio.Task[None]) -> None:
        """Let go of the question here and there."""
        super().stop(watch)
        if self._task is not None:
            self._task.cancel()


def starter(engine: Engine, settings: ServeSettings) -> Callable[[Question], Running]:
    """Return what begins a question: the engine's own way, or the far one."""
    if settings.language_endpoint is None:
        return lambda question: Running(engine, question)
    limit = settings.max_batch + settings.max_waiting
    far = FarLanguage(settings.language_endpoint, key=settings.language_key, max_requests=limit)
    return lambda question: FarRunning(engine, question, far)


def _told(error: Exception, url: str) -> Exception:
    """Return an error as our client is told it."""
    import openai

    if isinstance(error, openai.RateLimitError):
        return BusyError(f"{url} is busy; come again later", 2)
    if isinstance(error, openai.APIStatusError):
        message = " ".join(str(error.message).split())[:160]
        return HTTPException(502, f"{url} refuses ({error.status_code}): {message}")
    if isinstance(error, openai.APIError):
        return HTTPException(502, f"{url} does not answer ({type(error).__name__})")
    return error
