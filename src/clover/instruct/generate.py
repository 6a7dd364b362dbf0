"""Generation-based instructions: captions to an endpoint, question and answer pairs back.

In: a caption file of any size, read as a stream. Out: `F`, one record a pair, in the order of the
captions; `F.failed.jsonl`, every caption that brought none, with its reason; and the ledger.
A reply lives in the ledger from the moment it arrives; `F` is written from there, so a run that
was killed loses at most what was in flight, and the same command finishes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clover.core.endpoint import Client, check_endpoint, find_key, is_loopback
from clover.core.errors import CloverError
from clover.core.files import write_jsonl
from clover.core.record import Record
from clover.core.terminal import Advance, progress
from clover.instruct.ask import Asker, BudgetReached, Stop
from clover.instruct.batch import BatchSettings, ask_in_batches
from clover.instruct.caption import Captions
from clover.instruct.ledger import Ledger, ledger_path, writing
from clover.instruct.merge import remove_shards
from clover.instruct.parse import parse_pairs
from clover.instruct.prices import Price, estimate_message_tokens, estimate_tokens, find_price
from clover.instruct.prompt import GenerationPrompt, build_request, load_prompt

# What a hosted model takes for a reply of this length, before a ledger knows better.
_ASSUMED_SECONDS = 3.0
# Seconds over which the first requests are spread.
_LONGEST_SPREAD = 0.5


@dataclass(frozen=True)
class GenerateSettings:
    """Where and how to ask."""

    endpoint: str
    """URL of an OpenAI-compatible endpoint, usually ending in /v1."""
    model: str
    """The model's name at the endpoint."""
    prompt: str = "published-v1"
    """A prompt that comes with CLOVER, or a YAML file."""
    budget_usd: float | None = None
    """Most dollars that may ever be booked in this output's ledger."""
    price: Price | None = None
    """Dollars per million tokens, for models that are not listed."""
    limit: int | None = None
    """Ask about the first so many captions only."""
    concurrency: int = 16
    """Requests in flight."""
    attempts: int = 8
    """Times a caption is asked before it is listed as failed."""
    timeout_s: float = 120.0
    """Seconds to wait for a reply."""
    longest_wait_s: float = 60.0
    """Longest pause between two attempts, when the endpoint names none."""
    key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the API key."""
    retry_failed: bool = False
    """Ask again also about captions that failed for good."""
    any_language: bool = False
    """Keep captions that do not read as English."""
    is_trusted: bool = False
    """The model has answered this prompt, as another ledger says: what it declines, it declines."""
    batch: BatchSettings | None = None
    """Use the Batch API: half the price, an answer within a day."""


@dataclass(frozen=True)
class GenerateSummary:
    """What a run did. Tokens and dollars are the ledger's, earlier runs included."""

    asked: int
    """Captions that were fit to be asked about."""
    done: int
    failed: int
    left: int
    """Captions not asked: the budget was reached, the run was stopped, or they are waiting."""
    waiting: int
    """Of these, captions whose request is in an open batch; `--batch` takes them up."""
    set_aside: int
    """Captions that were not fit: empty, too long, another language."""
    pairs: int
    seconds: float
    sent: int
    """Requests sent by this run; 0 when all was there already."""
    input_tokens: int
    output_tokens: int
    usd: float
    lost_usd: float
    """Worst case of requests whose reply never arrived."""
    stopped: str | None = None
    """Why the run ended early, if it did."""


@dataclass(frozen=True)
class Plan:
    """What a run would ask and cost."""

    captions: int
    requests: int
    """Captions still to be asked, repeated ones once."""
    waiting: int
    """Captions in an open batch; they are not asked again."""
    set_aside: int
    input_tokens: int
    output_tokens: int
    usd: float
    hours: float
    price: Price
    basis: str
    """Where the output length comes from: the prompt's example, or this ledger's replies."""


@dataclass
class Job:
    """All that one run holds in its hands."""

    settings: GenerateSettings
    prompt: GenerationPrompt
    price: Price
    endpoint: str
    key: str = field(repr=False)
    ledger: Ledger
    sent: int = 0
    stopped: str | None = None
    in_flight: set[str] = field(default_factory=set)

    @functools.cached_property
    def prompt_identity(self) -> str:
        """Version and hash of the prompt; hashed once a run, not once a record."""
        return self.prompt.identity


def resolve_price(settings: GenerateSettings) -> Price:
    """Return the price of the model; a listed name costs its list price behind any address.

    Raises:
        CloverError: an unlisted model on another machine.
    """
    price = settings.price or _known_price(settings)
    return price.halved() if settings.batch else price


def _known_price(settings: GenerateSettings) -> Price:
    listed = find_price(settings.model, is_local=False)
    found = listed or find_price(settings.model, is_local=is_loopback(settings.endpoint))
    if found is None:
        raise CloverError(
            f"no price is listed for model '{settings.model}'; give --price input,output in "
            "dollars per million tokens (--price 0,0 when it is free); nothing sent"
        )
    return found


def budget_reached(settings: GenerateSettings) -> str:
    """Say why a run ended early."""
    return f"the budget of ${settings.budget_usd or 0:g} is reached"


def check_settings(settings: GenerateSettings) -> None:
    """Check what can be checked before anything is sent.

    Raises:
        CloverError: a number out of its range.
    """
    if settings.concurrency < 1:
        raise CloverError(f"--concurrency {settings.concurrency} is less than 1")
    if settings.limit is not None and settings.limit < 1:
        raise CloverError(f"--limit {settings.limit} is less than 1")
    # Asked so that NaN, which is less than nothing and not more, is refused too.
    if settings.budget_usd is not None and not 0 <= settings.budget_usd < math.inf:
        raise CloverError(f"--budget {settings.budget_usd:g} is not a number from 0")
    if not 0 < settings.timeout_s < math.inf:
        raise CloverError(f"--timeout {settings.timeout_s:g} is not more than 0 seconds")


def plan_file(captions: Path, *, out: Path, settings: GenerateSettings) -> Plan:
    """Predict what a run would ask and cost, sending nothing.

    Raises:
        CloverError: see `generate_file`.
    """
    check_settings(settings)
    check_endpoint(settings.endpoint)
    prompt, price = load_prompt(settings.prompt), resolve_price(settings)
    source = Captions(captions, settings.any_language, settings.limit)
    ledger_file = ledger_path(out)
    ledger = Ledger(ledger_file) if ledger_file.exists() else None
    known = ledger.means(settings.model) if ledger else None
    output, seconds = known or (_expected_output(prompt), _ASSUMED_SECONDS)
    total, waiting, inputs, keys = 0, 0, 0, set[str]()
    fixed = None
    for record in source:
        total += 1
        request = build_request(prompt, record.caption or "", model=settings.model)
        waiting += bool(ledger and ledger.is_in_batch(request.key))
        is_known = ledger and not ledger.may_ask(request.key, retry_failed=settings.retry_failed)
        if request.key in keys or is_known:
            continue
        keys.add(request.key)
        if fixed is None:  # all but the caption is the same in every request
            fixed = estimate_message_tokens(request.body["messages"])
            fixed -= estimate_tokens(record.caption or "")
        inputs += fixed + estimate_tokens(record.caption or "")
    if ledger:
        ledger.close()
    outputs = round(len(keys) * output)
    return Plan(
        captions=total,
        requests=len(keys),
        waiting=waiting,
        set_aside=source.num_rejected,
        input_tokens=inputs,
        output_tokens=outputs,
        usd=price.dollars(inputs, outputs),
        hours=len(keys) * seconds / settings.concurrency / 3600,
        price=price,
        basis="this ledger's replies" if known else "the prompt's worked example",
    )


def _expected_output(prompt: GenerationPrompt) -> float:
    """Return the tokens of a usual reply: the worked example, stretched to the pairs asked for."""
    if prompt.example is None:
        return prompt.max_tokens / 4
    pairs = max(1, len(parse_pairs(prompt.example.answer)))
    stretched = estimate_tokens(prompt.example.answer) * sum(prompt.pairs) / 2 / pairs
    return min(stretched, float(prompt.max_tokens))


def generate_file(captions: Path, *, out: Path, settings: GenerateSettings) -> GenerateSummary:
    """Generate instructions for a caption file.

    Writes `out`, ``out.failed.jsonl`` and, where captions were set aside, ``out.rejected.jsonl``.
    The same call again continues; it asks nothing whose reply is stored. Images are named from the
    folder of `out`.

    Raises:
        CloverError: a bad file, URL, key, price or prompt, before anything is sent; or an endpoint
            that stopped answering, after what was finished has been written.
    """
    source = Captions(Path(captions), settings.any_language, settings.limit, out=Path(out))
    return generate_from(source, out=out, settings=settings)


def generate_from(source: Captions, *, out: Path, settings: GenerateSettings) -> GenerateSummary:
    """Generate instructions for captions that can be read more than once; see `generate_file`."""
    check_settings(settings)
    total = sum(1 for _ in source)  # also finds a broken file before a cent is spent
    start = time.perf_counter()
    with open_job(out, settings) as job:
        try:
            with progress("generate", total) as advance:
                run = ask_all if settings.batch is None else ask_in_batches
                asyncio.run(run(source, job=job, advance=advance))
        finally:
            summary = write_output(source, out=out, job=job, seconds=time.perf_counter() - start)
    return summary


@contextlib.contextmanager
def open_job(out: Path, settings: GenerateSettings) -> Iterator[Job]:
    """Open the ledger of an output to spend from, and settle what a killed run left behind.

    Raises:
        CloverError: a bad URL, key, price or prompt; or another process writes this output.
    """
    check_settings(settings)
    # The address first: what is no URL must not be answered with a question for its price.
    endpoint = check_endpoint(settings.endpoint)
    price, prompt = resolve_price(settings), load_prompt(settings.prompt)
    key = find_key(endpoint, settings.key_env)
    with writing(ledger_path(out)) as ledger:
        ledger.recover()
        remove_shards(ledger, out)
        yield Job(settings, prompt, price, endpoint, key, ledger)


async def ask_all(records: Iterable[Record], *, job: Job, advance: Advance) -> None:
    """Ask about every record with bounded concurrency; the first request goes alone."""
    settings = job.settings
    stream = declined_last(records, job)
    async with Client(
        job.endpoint, key=job.key, timeout_s=settings.timeout_s, concurrency=settings.concurrency
    ) as client:
        asker = Asker(
            client,
            ledger=job.ledger,
            price=job.price,
            settings=settings,
            prompt=job.prompt_identity,
            wants_pairs=job.prompt.format != "answer",
        )

        async def work(first_only: bool = False) -> None:
            for record in stream:
                request = build_request(job.prompt, record.caption or "", model=settings.model)
                may_ask = job.ledger.may_ask(request.key, retry_failed=settings.retry_failed)
                if may_ask and request.key not in job.in_flight:
                    job.in_flight.add(request.key)
                    try:
                        await asker.ask(request)
                    finally:
                        job.in_flight.discard(request.key)
                        job.sent = asker.sent
                advance(note=f"${job.ledger.committed_usd:.4f}")
                if first_only and asker.sent:
                    return

        try:
            # A wrong address, key or model shows here, before a second request is sent.
            with job.ledger.grouped():
                start = time.perf_counter()
                await work(first_only=True)
                # Who starts together comes back together, and stands in a queue ever after.
                spread = min(time.perf_counter() - start, _LONGEST_SPREAD) / settings.concurrency
                async with asyncio.TaskGroup() as group:
                    for _ in range(settings.concurrency):
                        group.create_task(work())
                        await asyncio.sleep(spread)
        except* BudgetReached:
            job.stopped = budget_reached(settings)
        except* Stop as stops:
            raise CloverError(str(next(_leaves(stops)))) from None
        finally:
            job.sent = asker.sent


def declined_last(records: Iterable[Record], job: Job) -> Iterator[Record]:
    """Yield records, at the end those that were declined before the model answered anything.

    Else the same few at the head of a file would stop every run before it gets to the others.
    """
    declined = job.ledger.open_declined(job.settings.model, job.prompt_identity)
    if not declined:  # all but always; a key a record would be for nothing
        yield from records
        return
    last = []
    for record in records:
        if _key(record, job) in declined:
            last.append(record)
        else:
            yield record
    yield from last


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _rows_of(record: Record, key: str, job: Job) -> list[dict[str, Any]]:
    """Return the instruction records of one caption from the ledger, in JSON-able form."""
    stored = job.ledger.reply(key)
    if stored is None:
        return []
    rows: list[dict[str, Any]] = []
    for number, pair in enumerate(
        parse_pairs(stored[0], is_cut_off=stored[1] == "length"), start=1
    ):
        own = {
            "id": f"{record.id}-g{number}",
            "question": pair.question,
            "answer": pair.answer,
            "answer_type": pair.answer_type,
        }
        if not rows:
            common = {
                "group": record.group or record.image or record.id,
                "origin": "generated",
                "prompt": job.prompt_identity,
                "model": job.settings.model,
            }
            # One record gives the others their form: making it is dearer than filling it in.
            form = record.model_copy(update={**own, **common}).row()
        rows.append({**form, **own, **({"support": pair.support} if pair.support else {})})
    return rows


def _key(record: Record, job: Job) -> str:
    return build_request(job.prompt, record.caption or "", model=job.settings.model).key


def _failure(record: Record, job: Job) -> dict[str, Any] | None:
    """Return the line about a caption that brought no pairs, if it was asked."""
    reason = job.ledger.reason(_key(record, job))
    if reason is None:
        return None
    return {"id": record.id, "image": record.image, "reason": reason}


def write_output(source: Captions, *, out: Path, job: Job, seconds: float) -> GenerateSummary:
    """Write the output and the list of failures from the ledger; return the summary.

    An output that is there already stays where this prompt and model have no reply at all.
    """
    counts = {"asked": 0, "done": 0, "failed": 0, "waiting": 0, "pairs": 0}

    def rows() -> Iterator[dict[str, Any]]:
        for record in source:
            counts["asked"] += 1
            key = _key(record, job)
            pairs = _rows_of(record, key, job)
            if pairs:
                counts["done"] += 1
                counts["pairs"] += len(pairs)
                yield from pairs
            elif job.ledger.reason(key) is not None:
                counts["failed"] += 1
            elif job.ledger.is_in_batch(key):
                counts["waiting"] += 1

    stream = rows()
    first = next(stream, None)
    if first is not None:  # else what another prompt or model brought stays as it is
        write_jsonl(out, itertools.chain([first], stream))
    failed_file = Path(f"{out}.failed.jsonl")
    if counts["failed"]:
        # Looked up once more rather than kept: a bad endpoint may fail a million of them.
        write_jsonl(failed_file, filter(None, (_failure(record, job) for record in source)))
    else:
        failed_file.unlink(missing_ok=True)
    source.write_rejected(f"{out}.rejected.jsonl")
    totals = job.ledger.totals()
    return GenerateSummary(
        **counts,
        left=counts["asked"] - counts["done"] - counts["failed"],
        set_aside=source.num_rejected,
        seconds=round(seconds, 3),
        sent=job.sent,
        input_tokens=totals.input_tokens,
        output_tokens=totals.output_tokens,
        usd=round(totals.usd, 6),
        lost_usd=round(totals.lost_usd, 6),
        stopped=job.stopped,
    )
