"""A question that is being answered, seen from the event loop.

In: a question. Out: its pieces, one after the other, or the error that ended it. The engine's own
thread writes; a client that leaves ends the writing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fastapi import Request

from clover.serve.engine import Engine
from clover.serve.request import Begun, Event, Question, Ticket
from clover.serve.writing import Piece


class LeftError(Exception):
    """The client has gone."""


@dataclass
class Running:
    """A question in the engine, seen from the event loop."""

    engine: Engine
    question: Question
    has_failed: bool = False
    ticket: Ticket | None = None
    events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)

    async def begin(self) -> Begun:
        """Submit the question and wait until its prompt was read.

        Raises:
            CloverError: it cannot be answered, or too many wait.
        """
        try:
            await self.submit()
            event = await self.next_event()
        except BaseException:
            self.has_failed = True
            raise
        assert isinstance(event, Begun), "a prompt is read before anything is written"
        return event

    async def submit(self) -> None:
        """Give the question to whoever writes the answer."""
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended before the engine
                loop.call_soon_threadsafe(self.events.put_nowait, event)

        self.ticket = self.engine.submit(self.question, emit)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what is written, until every answer has ended."""
        left = len(self.question.seeds)
        while left:
            event = await self.next_event()
            if isinstance(event, Piece):
                yield event
                left -= event.finish_reason is not None

    async def next_event(self) -> Event:
        """Return what comes next; an error is raised."""
        event = await self.events.get()
        if event is None:
            raise LeftError
        if isinstance(event, Exception):
            raise event
        return event

    async def watch(self, request: Request) -> None:
        """Stop when the client leaves."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        if self.ticket is not None:
            self.ticket.cancel()
        self.events.put_nowait(None)

    def stop(self, watch: asyncio.Task[None]) -> None:
        """Let go of the question, answered or not."""
        watch.cancel()
        if self.ticket is not None:
            self.ticket.cancel()
