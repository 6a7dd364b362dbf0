"""The prompt of a generation request: a versioned YAML, and the messages built from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from clover.core.endpoint import MOST_TOKENS
from clover.core.errors import CloverError, nearest
from clover.core.files import fingerprint
from clover.instruct.phrase import phrases

PROMPTS = Path(__file__).resolve().parent / "prompts"

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "pairs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "question": {"type": "string"},
                    "answer": {"type": "string"},
                    "type": {"type": "string", "enum": ["open", "closed"]},
                    "support": {"type": "string"},
                },
                "required": ["question", "answer", "type", "support"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["pairs"],
    "additionalProperties": False,
}
"""What the structured prompt asks the endpoint to hold to."""

QUESTION = r"^(What|Which|Where|How|Who|Why|Describe) [A-Za-z ,'()-]{8,100}\?$"
"""What a model that copies its answers may ask: one open question, and nothing after its mark."""


def copy_schema(phrases: Sequence[str], pairs: tuple[int, int]) -> dict[str, Any]:
    """Return a schema whose answers can be nothing but phrases of the caption.

    Args:
        phrases: What may be an answer.
        pairs: Least and most pairs.
    """
    answer = {"type": "string", "enum": list(phrases)}
    pair = {
        "type": "object",
        # The answer first: a small model asks better about words that stand before it.
        "properties": {"answer": answer, "question": {"type": "string", "pattern": QUESTION}},
        "required": ["answer", "question"],
        "additionalProperties": False,
    }
    least, most = pairs
    listed = {"type": "array", "minItems": least, "maxItems": most, "items": pair}
    return {
        "type": "object",
        "properties": {"pairs": listed},
        "required": ["pairs"],
        "additionalProperties": False,
    }


class Example(BaseModel):
    """The one worked example of a prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    caption: str
    answer: str


class GenerationPrompt(BaseModel):
    """A prompt file: system role, worked example, sampling parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    version: str
    format: Literal["text", "json", "copy", "answer"]
    """Pairs as text; as JSON; as JSON whose answers are phrases of the caption; or no pairs: an
    answer to the question that stands in the caption's place."""
    pairs: tuple[NonNegativeInt, NonNegativeInt]
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(1024, ge=1, lt=MOST_TOKENS)
    system: str | None = None
    example: Example | None = None
    user: str = "{caption}"

    @property
    def identity(self) -> str:
        """Version and a hash of the content: an edited prompt is another prompt."""
        return f"{self.version}@{fingerprint(self.model_dump(mode='json'))[:8]}"


@dataclass(frozen=True)
class Request:
    """One chat request, ready to be sent, and the key that names its content."""

    key: str
    body: dict[str, Any]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all that is sent: no byte-level tokeniser makes more tokens of them."""
        messages = sum(len(message["content"].encode()) for message in self.body["messages"])
        # Some sellers count the schema as input.
        schema = self.body.get("response_format")
        return messages + (len(json.dumps(schema)) if schema else 0)


def load_prompt(name: str | Path) -> GenerationPrompt:
    """Read a prompt: the name of one that comes with CLOVER, or a YAML file.

    Raises:
        CloverError: no such prompt, or a file that is not one.
    """
    path = Path(name)
    if not path.is_file():
        path = PROMPTS / f"{name}.yaml"
    if not path.is_file():
        raise CloverError(f"no prompt {name}{nearest(str(name), known_prompts())}")
    try:
        prompt = GenerationPrompt.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CloverError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise CloverError(f"{path}: {where}: {first['msg'].lower()}") from error
    if "{caption}" not in prompt.user:
        raise CloverError(f"{path}: 'user' has no {{caption}}; put it where the caption belongs")
    return prompt


def known_prompts() -> list[str]:
    """Return the names of the prompts that come with CLOVER and ask for pairs."""
    return sorted(path.stem for path in PROMPTS.glob("*.yaml"))


def build_request(prompt: GenerationPrompt, caption: str, *, model: str) -> Request:
    """Build the request for one caption.

    The key covers all that shapes the reply (prompt, model, parameters, caption) and nothing that
    does not (endpoint, image), so that the same caption is paid for once.
    """
    # replace, not format: captions and examples hold braces of their own.
    messages = [{"role": "system", "content": prompt.system.strip()}] if prompt.system else []
    if prompt.example:
        example = prompt.user.replace("{caption}", prompt.example.caption.strip()).strip()
        messages.append({"role": "user", "content": example})
        messages.append({"role": "assistant", "content": prompt.example.answer.strip()})
    text = prompt.user.replace("{caption}", caption).strip()
    messages.append({"role": "user", "content": text})
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "temperature": prompt.temperature,
        "top_p": prompt.top_p,
        "max_tokens": prompt.max_tokens,
    }
    schema = _schema(prompt, caption)
    if schema is not None:
        named = {"name": "pairs", "strict": True, "schema": schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    return Request(fingerprint({"prompt": prompt.version, **body}), body)


def _schema(prompt: GenerationPrompt, caption: str) -> dict[str, Any] | None:
    if prompt.format == "json":
        return SCHEMA
    if prompt.format != "copy":
        return None
    found = phrases(caption)
    # A caption of function words alone leaves nothing to copy but itself.
    return copy_schema(found or [caption], prompt.pairs)
