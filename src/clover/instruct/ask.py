"""One caption asked until it is answered: reserve, send, judge, settle; and when to give up."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from clover.core.endpoint import Client, Declined, Lost, Refused, Reply, Unusable, pause_s
from clover.core.errors import CloverError
from clover.instruct.ledger import Ledger, Worst
from clover.instruct.parse import parse_pairs
from clover.instruct.prices import Price, estimate_message_tokens, estimate_tokens
from clover.instruct.prompt import Request

if TYPE_CHECKING:
    from tenacity import RetryCallState

    from clover.instruct.generate import GenerateSettings

# Chat formats add a few tokens a message that no one sees.
_FORMAT_TOKENS = 64
_PROBES = 3
_DECLINED_AT_START = 3


class BudgetReached(Exception):
    """The budget does not allow one more request, and none in flight can free any."""


class Stop(Exception):
    """The run must end: the user has something to put right."""


class Asker:
    """Asks about captions, one call each, any number at the same time.

    Args:
        client: The way to the endpoint.
        ledger: Where every sending is booked.
        price: Of the model.
        settings: Model, budget, attempts and pauses.
        prompt: The prompt's identity, for the books.
        wants_pairs: A reply without a question and answer pair is no reply.
    """

    def __init__(
        self,
        client: Client,
        *,
        ledger: Ledger,
        price: Price,
        settings: GenerateSettings,
        prompt: str,
        wants_pairs: bool = True,
    ) -> None:
        self.sent = 0
        self._client, self._ledger, self._price = client, ledger, price
        self._settings, self._prompt = settings, prompt
        self._wants_pairs = wants_pairs
        self._flying = 0
        self._landed = asyncio.Event()
        self._aliases: set[str] = set()
        self._strangers: list[str] = []
        self._done = self._failures_in_a_row = 0
        # What was declined before anything succeeded: it may be the request's form, not a caption.
        self._doubtful: dict[str, str] = {}
        self._is_trusted = settings.is_trusted or ledger.has_reply(settings.model, prompt)

    async def ask(self, request: Request) -> None:
        """Ask until there is a usable reply; book a failure with its reason otherwise.

        Raises:
            BudgetReached: no money for this request.
            Stop: the endpoint cannot be worked with, or stopped answering.
        """
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        retrying = AsyncRetrying(
            retry=retry_if_exception_type((Refused, Lost, Unusable)),
            stop=stop_after_attempt(self._settings.attempts),
            wait=self._pause,
            reraise=True,
        )
        try:
            await retrying(self._once, request)
        except Declined as error:
            reason = f"declined: {error}"
            self._ledger.fail(request.key, reason, is_final=self._is_trusted)
            if not self._is_trusted:
                self._doubtful[request.key] = reason
                if len(self._doubtful) >= _DECLINED_AT_START:
                    raise Stop(
                        f"{self._client.endpoint} declines every request so far ({error}); if it "
                        "is these captions, the same command goes on with the others"
                    ) from error
        except Unusable as error:
            self._ledger.fail(request.key, str(error), is_final=True)
        except (Refused, Lost) as error:
            self._ledger.fail(request.key, str(error), is_final=False)
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= max(8, self._settings.concurrency):
                raise Stop(
                    f"{self._client.endpoint} stopped answering ({error}); "
                    "what arrived is kept, the same command continues"
                ) from error

    async def _once(self, request: Request) -> None:
        """Send a request once and book what came of it."""
        attempt = await self._reserve(request)
        self._flying += 1
        start = None
        try:
            await self._ledger.committed()
            self.sent += 1
            start = time.perf_counter()
            reply = await self._client.send(request.body)
            estimated_input = 0
            if reply.tokens is None:
                estimated_input = estimate_message_tokens(request.body["messages"])
            seconds = time.perf_counter() - start
            self.settle(attempt, reply, estimated_input=estimated_input, seconds=seconds)
        except Refused as error:
            self._ledger.refuse(attempt, str(error))
            if not self._answered and "cannot connect" in str(error):
                raise Stop(f"{error}; nothing was spent") from error
            raise
        except Lost as error:
            self._ledger.lose(attempt, str(error))
            if not self._answered and "holds no answer" in str(error):
                raise Stop(
                    f"{self._client.endpoint} does not answer like an OpenAI-compatible endpoint "
                    "(the address usually ends in /v1)"
                ) from error
            raise
        except (Declined, CloverError) as error:
            self._ledger.refuse(attempt, str(error))
            if isinstance(error, CloverError):
                raise Stop(str(error)) from error
            raise
        except asyncio.CancelledError:
            if start is None:
                self._ledger.refuse(attempt, "stopped before this was sent")
            else:
                self._ledger.lose(attempt, "stopped while this was in flight")
            raise
        finally:
            self._flying -= 1
            self._landed.set()
            self._landed = asyncio.Event()

    @property
    def _answered(self) -> bool:
        return self._done > 0

    async def _reserve(self, request: Request) -> int:
        worst = worst_case(request)
        while True:
            attempt = self._ledger.reserve(
                request.key,
                request=(self._settings.model, self._prompt, self._client.endpoint),
                worst=worst,
                price=self._price,
                budget=self._settings.budget_usd,
            )
            if attempt is not None:
                return attempt
            if not self._flying:
                raise BudgetReached
            # What lands settles below its worst case, and may free enough.
            await self._landed.wait()

    def settle(
        self, attempt: int, reply: Reply, *, estimated_input: int, seconds: float = 0.0
    ) -> None:
        """Book a reply that arrived.

        Raises:
            Unusable: it is paid for and booked, but no answer to what was asked.
        """
        tokens = reply.tokens or (estimated_input, estimate_tokens(reply.text))
        estimated = reply.tokens is None
        fault = self._fault(reply)
        if fault is not None:
            self._ledger.settle_unusable(attempt, tokens=tokens, note=fault, is_estimated=estimated)
            raise Unusable(fault)
        self._ledger.settle(
            attempt,
            tokens=tokens,
            reply=reply.text,
            finish_reason=reply.finish_reason,
            seconds=seconds,
            is_estimated=estimated,
        )
        self._done += 1
        self._failures_in_a_row = 0
        self._is_trusted = True
        for key, reason in self._doubtful.items():
            self._ledger.fail(key, reason, is_final=True)
        self._doubtful.clear()

    def _fault(self, reply: Reply) -> str | None:
        """Return why a reply cannot be used, or None."""
        asked = self._settings.model
        if not _is_same_model(asked, reply.model) and reply.model not in self._aliases:
            # Some servers call every model by one name of their own: then all replies agree.
            self._strangers.append(reply.model)
            is_alias = not self._done and self._strangers[-_PROBES:] == [reply.model] * _PROBES
            if not is_alias:
                return f"answered by model '{reply.model}'"
            self._aliases.add(reply.model)
        if not reply.text.strip():
            return f"empty reply (finish reason {reply.finish_reason})"
        is_cut_off = reply.finish_reason == "length"
        if self._wants_pairs and not parse_pairs(reply.text, is_cut_off=is_cut_off):
            return "no question and answer pair in the reply"
        return None

    def _pause(self, state: RetryCallState) -> float:
        """Return the seconds until the next attempt."""
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, Unusable):
            return 0.0
        return pause_s(error, state.attempt_number, self._settings.longest_wait_s)


def worst_case(request: Request) -> Worst:
    """Return what a request can cost at most."""
    # No byte-level tokeniser makes more tokens of a text than it has bytes.
    return Worst(request.text_bytes + _FORMAT_TOKENS, request.body["max_tokens"])


def _is_same_model(asked: str, answered: str) -> bool:
    """Say whether a reply's model is the one asked for; dated and tagged names are the same."""
    if not answered:
        return True
    first, second = (name.lower().rsplit("/", 1)[-1] for name in (asked, answered))
    return first.startswith(second) or second.startswith(first)
