"""OpenAI's wire format: what a chat request may hold, and what is answered.

What is not understood is refused by name, never ignored: an answer that silently left out a tool or
a penalty would be taken for one that had it. What changes no answer is named (`_HARMLESS`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from clover.core.errors import nearest
from clover.language.constraint import Schema
from clover.model import NOTICE
from clover.serve.writing import TokenScore

_HARMLESS = frozenset(
    (
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "parallel_tool_calls",  # of tools, which are refused
    )
)
"""Bookkeeping of OpenAI's own service: no answer depends on it, so that it is accepted unread."""
_OFF: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "modalities": ([], ["text"]),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}
"""Known elsewhere and not done here, with the values that ask for nothing; null always does."""
_SHOWN = 60
"""Characters of an unknown field's name that are looked at."""
_MAX_SCHEMA_DEPTH = 32
Role = Literal["system", "user", "assistant", "developer"]


class _Understood(BaseModel):
    """A request of which every field is read, asks for nothing, or changes nothing."""

    @model_validator(mode="before")
    @classmethod
    def _is_understood(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, value in data.items():
            if name in cls.model_fields or name in _HARMLESS:
                continue
            if name not in _OFF:
                short = str(name)[:_SHOWN]
                hint = nearest(short, cls.model_fields)
                raise _refused(short, f"unknown field '{short}'{hint}")
            if value is not None and value not in _OFF[name]:
                raise _refused(name, f"{name} is not supported here; leave it out")
        return data


def _refused(field: str, message: str) -> PydanticCustomError:
    """Return what is raised of a field that is not among the model's own."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": field})


class TextPart(BaseModel):
    """One text part of a message's content."""

    type: Literal["text"]
    text: str


class ImageAddress(BaseModel):
    """A data URI, or where the server allows it an http(s) address."""

    url: str


class ImagePart(BaseModel):
    """One image part of a message's content."""

    type: Literal["image_url"]
    image_url: ImageAddress


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(BaseModel):
    """One message of a conversation."""

    role: Role
    content: str | list[Part] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_said_in_words(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in ("tool_calls", "function_call", "audio"):
                if data.get(name):
                    raise ValueError(f"{name} of a message is not read here; leave it out")
        return data

    @property
    def text(self) -> str:
        """The text parts, a line each."""
        if not isinstance(self.content, list):
            return self.content or ""
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """The addresses of the image parts."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]

    def plain(self) -> dict[str, str]:
        """Return the message as a chat template reads it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text}


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
        if self.json_schema is not None and _depth(self.json_schema.schema_) > _MAX_SCHEMA_DEPTH:
            raise ValueError(f"the JSON schema is nested deeper than {_MAX_SCHEMA_DEPTH}")
        return self

    @property
    def schema_of_reply(self) -> Schema | None:
        """The schema to hold a reply to; none for text."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else {"type": "object"}


class StreamOptions(BaseModel):
    """Of a streamed reply."""

    include_usage: bool = False


Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class ChatRequest(_Understood):
    """The part of OpenAI's chat completion request that is understood here."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=200)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=16)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_top(self) -> int | None:
        """How many likeliest tokens are reported at each place; none when no scores are asked."""
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingRequest(_Understood):
    """OpenAI's embedding request; a data URI among the inputs is an image."""

    model: str
    input: str | Annotated[list[str], Field(min_length=1, max_length=256)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None

    @property
    def inputs(self) -> list[str]:
        """The inputs as a list."""
        return [self.input] if isinstance(self.input, str) else self.input


def _depth(value: Any) -> int:
    """Return how deep lists and objects are nested, without recursion."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return deepest


def error_body(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Reply:
    """Builds the JSON of one chat completion, whole or in chunks."""

    def __init__(self, model: str, note: str | None = None) -> None:
        self._model, self._note = model, note
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """Return a completion."""
        return self._head("chat.completion") | {"choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return a chunk of a streamed completion."""
        return self._head("chat.completion.chunk") | {"choices": choices} | more

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
            "notice": NOTICE,
            **({} if self._note is None else {"image_note": self._note}),
        }


def choice(
    index: int, text: str, finish_reason: str | None, scores: Sequence[TokenScore] | None
) -> dict[str, Any]:
    """Return one whole answer."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None if scores is None else logprobs(scores),
        "finish_reason": finish_reason,
    }


def delta(
    index: int,
    content: dict[str, str],
    finish_reason: str | None = None,
    scores: Sequence[TokenScore] | None = None,
) -> dict[str, Any]:
    """Return what a chunk adds to one answer."""
    return {
        "index": index,
        "delta": content,
        "logprobs": None if scores is None else logprobs(scores),
        "finish_reason": finish_reason,
    }


def usage_body(prompt_tokens: int, reused_tokens: int, written_tokens: int) -> dict[str, Any]:
    """Return the token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written_tokens,
        "total_tokens": prompt_tokens + written_tokens,
        "prompt_tokens_details": {"cached_tokens": reused_tokens},
    }


def logprobs(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """Return token scores in OpenAI's shape."""
    rows = [
        _scored(item.token, item.logprob)
        | {"top_logprobs": [_scored(token, value) for token, value in item.top]}
        for item in scores
    ]
    return {"content": rows, "refusal": None}


def _scored(token: str, value: float) -> dict[str, Any]:
    return {
        "token": token,
        # JSON knows no infinity; OpenAI writes the least it gives.
        "logprob": max(value, -9999.0),
        "bytes": list(token.encode("utf-8", "replace")),
    }
