"""Plain text chat of the same frozen model, without an image.

In: conversations in the form of the OpenAI API. Out: replies with token counts. The local
endpoint of `clover.serve` stands on this, so that instruction generation in the demo goes over
the same path as with a large model elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from clover.core.errors import CloverError
from clover.language.decoder_only import DecoderOnly
from clover.language.generation import Constraint
from clover.language.protocol import GenerationSettings

Message = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""

_WORTHWHILE = 8
"""Shared tokens from which on a common beginning is computed once for the batch."""


class ChatReply(NamedTuple):
    """One reply and what it took."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    """`stop`, or `length` when the reply was cut at `max_tokens`."""


def chat_ids(language: DecoderOnly, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation up to where the assistant speaks.

    Raises:
        CloverError: the model has no chat template, or the template refuses the conversation.
    """
    tokenizer = language.tokens.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        name = Path(language.id).name  # a server's clients need not know where it lies
        raise CloverError(f"{name} has no chat template; name an instruction-tuned model")
    if not messages:
        raise CloverError("the conversation has 0 messages; give at least one")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError) as error:
        raise CloverError(f"the model's chat template refuses the conversation: {error}") from error
    return language.tokens.encode(text)


def complete(
    language: DecoderOnly,
    conversations: Sequence[Sequence[Message]],
    settings: GenerationSettings,
    *,
    seeds: Sequence[int] | None = None,
    constraints: Sequence[Constraint | None] | None = None,
) -> list[ChatReply]:
    """Answer several conversations as one batch.

    Args:
        language: the model.
        conversations: each a list of messages.
        settings: the same for all.
        seeds: one a conversation; a reply does not depend on what else is in the batch.
        constraints: one a conversation, or none, of what its reply may be.
    """
    prompts = [chat_ids(language, messages) for messages in conversations]
    if not prompts:
        return []
    shared = _shared_length(prompts)
    rows = language.generate_from_ids(
        None,
        [prompt[shared:] for prompt in prompts],
        settings,
        prefix=prompts[0][:shared],
        seeds=seeds,
        constraints=constraints,
    )
    replies = []
    for prompt, ids in zip(prompts, rows, strict=True):
        is_ended = bool(ids) and any(token in language.tokens.stop_ids for token in ids)
        text = language.tokens.decode(ids)
        replies.append(ChatReply(text, len(prompt), len(ids), "stop" if is_ended else "length"))
    return replies


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all prompts share, 0 where it is not worth a pass."""
    if len(prompts) < 2:
        return 0
    # Every row keeps a token of its own, from which the first logits come.
    limit = min(map(len, prompts)) - 1
    first = prompts[0]
    shared = 0
    while shared < limit and all(prompt[shared] == first[shared] for prompt in prompts):
        shared += 1
    return shared if shared >= _WORTHWHILE else 0
