"""The Batch API: half the price, an answer within a day, resumable from another process.

A batch is booked in the ledger, request by request, before its file is uploaded; its name travels
as metadata, so that a process killed between creating and noting finds its batch again. Results
come in any order and in two files, one of them perhaps absent; what is in neither is not owed.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clover.core.endpoint import Client, Lost, Unusable, read_reply, whole_text
from clover.core.errors import CloverError
from clover.core.record import Record
from clover.core.terminal import Advance
from clover.instruct.ask import Asker, worst_case
from clover.instruct.prompt import Request, build_request

if TYPE_CHECKING:
    from clover.instruct.generate import Job

_ENDED = {"completed", "failed", "expired", "cancelled"}


@dataclass(frozen=True)
class BatchSettings:
    """Limits of a batch, at most the endpoint's own."""

    max_requests: int = 20_000
    """Requests a batch; endpoints allow 50,000, smaller ones come back sooner."""
    max_bytes: int = 150_000_000
    """Bytes a file; endpoints allow 200 MB."""
    poll_s: float = 30.0
    """Seconds between two looks at a batch."""


async def ask_in_batches(records: Iterable[Record], *, job: Job, advance: Advance) -> None:
    """Take up open batches, then send what is not asked yet, batch by batch, and wait.

    Raises:
        CloverError: the endpoint refuses files or batches.
    """
    import openai

    batch = job.settings.batch
    assert batch is not None
    async with Client(job.endpoint, key=job.key, timeout_s=job.settings.timeout_s) as client:
        runner = _Runner(client, job, batch, advance)
        try:
            await runner.adopt()
            await runner.submit(records)
            await runner.collect()
        except openai.APIStatusError as error:
            message = " ".join(str(error.message).split())[:160]
            raise CloverError(
                f"{job.endpoint} refused a file or a batch ({error.status_code}: {message}); "
                "what arrived is kept, the same command continues"
            ) from error
        except openai.APIConnectionError as error:
            raise CloverError(
                f"cannot reach {job.endpoint} ({type(error.__cause__).__name__}); open batches are "
                "kept, the same command takes them up again"
            ) from error


class _Runner:
    """One run over the batches of one ledger."""

    def __init__(self, client: Client, job: Job, settings: BatchSettings, advance: Advance) -> None:
        self._openai, self._job, self._settings = client.openai, job, settings
        self._ledger, self._advance = job.ledger, advance
        self._asker = Asker(
            client,
            ledger=job.ledger,
            price=job.price,
            settings=job.settings,
            prompt=job.prompt.identity,
        )

    async def adopt(self) -> None:
        """Find out what became of batches whose creation was interrupted."""
        unknown = {name for name, remote in self._ledger.open_batches() if remote is None}
        if unknown:
            async for remote in self._openai.batches.list(limit=100):
                name = (remote.metadata or {}).get("clover")
                if name in unknown:
                    self._ledger.note_batch(name, remote=remote.id)
                    unknown.discard(name)
        for name in unknown:
            self._refuse(name, "the batch was never created")
            self._ledger.note_batch(name, state="ended", note="never created")

    # -- out ------------------------------------------------------------------------------

    async def submit(self, records: Iterable[Record]) -> None:
        """Book, upload and create batches for all that is not asked yet."""
        chunk: list[tuple[int, Request]] = []
        size = 0
        name = uuid.uuid4().hex
        for request in self._unasked(records):
            attempt = self._ledger.reserve(
                request.key,
                request=(self._job.settings.model, self._job.prompt.identity, self._job.endpoint),
                worst=worst_case(request),
                price=self._job.price,
                budget=self._job.settings.budget_usd,
                batch=name,
            )
            if attempt is None:
                self._job.stopped = f"the budget of ${self._job.settings.budget_usd:g} is reached"
                break
            if not chunk:
                self._ledger.note_batch(name)
            chunk.append((attempt, request))
            size += len(_line(attempt, request))
            if len(chunk) >= self._settings.max_requests or size >= self._settings.max_bytes:
                await self._create(name, chunk)
                chunk, size, name = [], 0, uuid.uuid4().hex
        if chunk:
            await self._create(name, chunk)

    def _unasked(self, records: Iterable[Record]) -> Iterator[Request]:
        settings = self._job.settings
        for record in records:
            request = build_request(self._job.prompt, record.caption or "", model=settings.model)
            if self._ledger.may_ask(request.key, retry_failed=settings.retry_failed):
                yield request
            elif not self._ledger.is_in_batch(request.key):
                self._advance()

    async def _create(self, name: str, chunk: list[tuple[int, Request]]) -> None:
        with tempfile.NamedTemporaryFile("wb", suffix=".jsonl") as file:
            for attempt, request in chunk:
                file.write(_line(attempt, request))
            file.flush()
            uploaded = await self._openai.files.create(file=Path(file.name), purpose="batch")
        remote = await self._openai.batches.create(
            input_file_id=uploaded.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"clover": name},
        )
        self._ledger.note_batch(name, remote=remote.id)
        self._job.sent += len(chunk)

    # -- back -----------------------------------------------------------------------------

    async def collect(self) -> None:
        """Wait for every open batch and book its results."""
        waiting = dict(self._ledger.open_batches())
        while waiting:
            for name, remote_id in list(waiting.items()):
                remote = await self._look(name, str(remote_id))
                if remote is None:
                    del waiting[name]
                    continue
                self._advance(0, note=f"batch {remote.status}")
                if remote.status in _ENDED:
                    await self._ingest(name, remote)
                    del waiting[name]
            if waiting:
                await asyncio.sleep(self._settings.poll_s)

    async def _look(self, name: str, remote_id: str) -> Any | None:
        """Return what the endpoint says of a batch; None when it no longer knows it.

        What such a batch cost nobody can say any more: it is booked at its worst case.

        Raises:
            CloverError: it is another endpoint that was given the batch.
        """
        import openai

        try:
            return await self._openai.batches.retrieve(remote_id)
        except openai.NotFoundError:
            owner = self._ledger.batch_endpoint(name)
            if owner not in (None, self._job.endpoint):
                raise CloverError(
                    f"batch {remote_id} was given to {owner} and is not known at "
                    f"{self._job.endpoint}; give --endpoint {owner}"
                ) from None
            # Whoever does not list batches has forgotten none: the address is wrong.
            await self._openai.batches.list(limit=1)
        reason = f"the endpoint no longer knows batch {remote_id}"
        for attempt, (key, _) in self._ledger.in_batch(name).items():
            self._ledger.lose(attempt, reason)
            self._ledger.fail(key, reason, is_final=False)
        self._ledger.note_batch(name, state="ended", note="no longer known")
        return None

    async def _ingest(self, name: str, remote: Any) -> None:
        """Book one ended batch; a batch may bring results, errors, both or neither."""
        flying = self._ledger.in_batch(name)
        for file_id in (remote.output_file_id, remote.error_file_id):
            if file_id:
                content = await self._openai.files.content(file_id)
                for line in content.read().splitlines():
                    if line.strip():
                        self._book(json.loads(line), flying)
        errors = getattr(getattr(remote, "errors", None), "data", None) or []
        why = whole_text(f": {errors[0].message}") if errors else ""
        self._refuse(name, f"not in the results of a batch that {_ended(remote.status)}{why}")
        self._ledger.note_batch(name, state="ended", note=remote.status)

    def _book(self, row: dict[str, Any], flying: dict[int, tuple[str, int]]) -> None:
        attempt = int(str(row.get("custom_id", "a-1"))[1:])
        if attempt not in flying:
            return  # delivered twice, or not ours
        key, worst_input = flying.pop(attempt)
        response = row.get("response") or {}
        body = response.get("body") or {}
        try:
            if response.get("status_code") != 200:
                error = body.get("error") or row.get("error") or {}
                message = whole_text(error.get("message", "no reason"))
                raise Lost(f"{response.get('status_code')}: {message}")
            self._asker.settle(attempt, read_reply(body), estimated_input=worst_input // 4)
        except Unusable as error:
            self._ledger.fail(key, str(error), is_final=False)
        except Lost as error:
            # The Batch API bills results alone.
            self._ledger.refuse(attempt, str(error))
            self._ledger.fail(key, str(error), is_final=False)
        self._advance(note=f"${self._ledger.committed_usd:.4f}")

    def _refuse(self, name: str, reason: str) -> None:
        for attempt, (key, _) in self._ledger.in_batch(name).items():
            self._ledger.refuse(attempt, reason)
            self._ledger.fail(key, reason, is_final=False)


def _ended(status: str) -> str:
    return status if status != "cancelled" else "was cancelled"


def _line(attempt: int, request: Request) -> bytes:
    row = {
        "custom_id": f"a{attempt}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": request.body,
    }
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
