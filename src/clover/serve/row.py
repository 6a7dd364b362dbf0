"""One answer of one request: what its prompt is made of, and what stands for it in the batch.

In: a request. Out: rows, each with its symbols: all that the keys and values at a place depend on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from clover.core.errors import CloverError
from clover.language.chat import chat_ids
from clover.language.constraint import SchemaConstraint
from clover.language.decoder_only import DecoderOnly
from clover.serve.kept import KeptPrompt, Symbol
from clover.serve.request import Question, Served, Ticket
from clover.serve.writing import Writing


@dataclass(eq=False)
class Row:
    """One answer of one request.

    Attributes:
        ticket: The request.
        served: The model it is put to.
        number: Which of the request's answers this is.
        prompt_ids: Text after the image; the whole prompt where there is none.
        symbols: Of the whole prompt.
        writing: The answer so far.
        generator: Its random numbers.
        constraint: What it is held to.
        arrived: When the request came, by `time.monotonic`.
        base: The constant beginning it stands behind.
    """

    ticket: Ticket
    served: Served
    number: int
    prompt_ids: list[int]
    symbols: list[Symbol]
    writing: Writing
    generator: torch.Generator
    constraint: SchemaConstraint | None
    arrived: float = field(default_factory=time.monotonic)
    base: KeptPrompt | None = None

    @property
    def question(self) -> Question:
        """What is asked."""
        return self.ticket.question


def rows_of(ticket: Ticket, served: Served) -> list[Row]:
    """Return a request's rows, one an answer.

    Raises:
        CloverError: prompt and answer are longer than the model's limit.
    """
    question = ticket.question
    language = served.language
    symbols: list[Symbol] = []
    if question.picture is None:
        assert isinstance(language, DecoderOnly), "the API checked that it can chat"
        ids = chat_ids(language, question.messages)
        symbols += ids
    else:
        assert served.clover is not None, "the API checked that it sees"
        symbols += language.prefix_ids
        symbols += visual_symbols(served, question)
        ids = language.text_ids(text_after(served, question))
        symbols += ids
    longest = getattr(language, "max_positions", 1 << 30)
    if len(symbols) + question.settings.max_tokens > longest:
        raise CloverError(
            f"the prompt has {len(symbols)} tokens and the answer may have "
            f"{question.settings.max_tokens}, together more than the model's {longest}; "
            "shorten the prompt or max_tokens"
        )
    return [
        Row(
            ticket,
            served,
            number,
            ids,
            symbols,
            fresh_writing(served, question),
            torch.Generator(language.device).manual_seed(seed % (1 << 63)),
            question.schema.begin() if question.schema is not None else None,
        )
        for number, seed in enumerate(question.seeds)
    ]


def visual_symbols(served: Served, question: Question) -> list[Symbol]:
    """Return what stands for the visual tokens: all that they are computed from."""
    clover, picture = served.clover, question.picture
    assert clover is not None and picture is not None, "only pictures have visual tokens"
    read = question.question if clover.recipe.tune.instruction_aware else None
    count = clover.bridge.config.num_queries
    return [(served.name, picture.sha256, read, index) for index in range(count)]


def fresh_writing(served: Served, question: Question) -> Writing:
    """Return the beginning of an answer."""
    return Writing(
        served.language.tokens, max_tokens=question.settings.max_tokens, stops=question.stops
    )


def text_after(served: Served, question: Question) -> str:
    """Return the text after the image."""
    turns, last = list(question.turns), question.question
    if question.system:
        if turns:
            turns[0] = (f"{question.system}\n{turns[0][0]}", turns[0][1])
        else:
            last = f"{question.system}\n{last}"
    return served.language.prompt.conversation(turns, last)[1]


def may_go_on(row: Row) -> bool:
    """Return whether a later turn can begin with this one's prompt and answer."""
    clover = row.served.clover
    return (
        row.question.picture is None or clover is None or not clover.recipe.tune.instruction_aware
    )
