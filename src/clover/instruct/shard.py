"""Generation in several processes, on this machine or under Ray: one function for each shard.

    captions -> shards of what is still to be asked -> `generate_shard` -> merged ledger -> output

Where a caption goes depends on its content alone, so that one which stands twice is asked once. A
shard is a caption file in ``F.shards`` with an output, a ledger and a done-file of its own; its
ledger is merged into ``F.ledger.sqlite``, and `F` is written from there: the same bytes as from one
process. What a killed run left in ``F.shards`` is merged by the next run, of whatever kind.

A budget is divided among the shards beforehand, so nothing has to be agreed on the way; what they
leave over goes to another round, and at last to one shard alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clover.core.errors import CloverError
from clover.core.files import read_json, write_json
from clover.core.record import Record
from clover.core.terminal import Advance, progress
from clover.instruct.caption import Captions
from clover.instruct.generate import (
    GenerateSettings,
    GenerateSummary,
    Job,
    ask_all,
    budget_reached,
    declined_last,
    generate_from,
    open_job,
    write_output,
)
from clover.instruct.merge import merge_shard, remove_shards, shards_folder
from clover.instruct.prompt import build_request

# Small enough that a lost worker costs little and the last one does not keep all others waiting.
_CAPTIONS_EACH = 2000
_MOST_SHARDS = 256


@dataclass(frozen=True)
class Shard:
    """A caption file, and how to ask about it."""

    captions: Path
    settings: GenerateSettings
    count: int
    """Captions in it."""

    @property
    def out(self) -> Path:
        """Where its instructions go; ledger and done-file lie beside."""
        return Path(f"{self.captions}.out")


@dataclass(frozen=True)
class ShardResult:
    """How a shard ended; what it brought is in its ledger."""

    stopped: str = ""
    """Why it ended early, for want of money."""
    error: str = ""
    """What the user has to put right."""


Runner = Callable[[list[Shard], int], Iterator[tuple[Shard, ShardResult]]]
"""Runs `generate_shard` on every shard, so many at a time; yields them as they end."""


def generate_shard(shard: Shard) -> ShardResult:
    """Ask about one shard's captions: what every worker runs, wherever it is.

    Writes the shard's output, its ledger, and at last its done-file. Called again it continues;
    where the done-file lies it does nothing.
    """
    done = Path(f"{shard.out}.done.json")
    if done.exists():
        return ShardResult(**read_json(done))
    source = Captions(shard.captions, is_clean=True)
    try:
        summary = generate_from(source, out=shard.out, settings=shard.settings)
    except CloverError as error:
        # One line for the user; a traceback of another process is none.
        return ShardResult(error=str(error))
    result = ShardResult(stopped=summary.stopped or "")
    write_json(done, dataclasses.asdict(result))
    return result


def generate_in_shards(
    captions: Path,
    *,
    out: Path,
    settings: GenerateSettings,
    workers: int,
    runner: Runner,
) -> GenerateSummary:
    """Generate instructions for a caption file with several processes.

    Does what `generate_file` does, and leaves the same files. `settings.concurrency` and
    `settings.budget_usd` hold for all workers together; `runner` is one of `workers.py`.

    Raises:
        CloverError: as `generate_file`; or fewer requests in flight than workers, or a batch.
    """
    _check(settings, workers)
    source = Captions(Path(captions), settings.any_language, settings.limit, out=Path(out))
    out = Path(out).resolve()
    settings = _with_whole_paths(settings)
    total = sum(1 for _ in source)
    start = time.perf_counter()
    with open_job(out, settings) as job:
        try:
            with progress("generate", total) as advance:
                _Rounds(source, out, job, workers, runner, advance).run(total)
        finally:
            remove_shards(job.ledger, out)
            summary = write_output(source, out=out, job=job, seconds=time.perf_counter() - start)
    return summary


def _check(settings: GenerateSettings, workers: int) -> None:
    if workers < 1:
        raise CloverError(f"--workers {workers} is less than 1")
    if settings.batch is not None:
        raise CloverError("--workers and --ray do not go with --batch, which asks by itself")
    if settings.concurrency < workers:
        raise CloverError(
            f"--concurrency {settings.concurrency} is less than --workers {workers}; "
            f"give --concurrency {workers} or more"
        )


def _with_whole_paths(settings: GenerateSettings) -> GenerateSettings:
    """Name a prompt's file so that a worker in another folder finds it."""
    path = Path(settings.prompt)
    return dataclasses.replace(settings, prompt=str(path.resolve())) if path.is_file() else settings


class _Rounds:
    """Cuts, runs and merges until all is asked or no money is left."""

    def __init__(
        self,
        source: Captions,
        out: Path,
        job: Job,
        workers: int,
        runner: Runner,
        advance: Advance,
    ) -> None:
        self._source, self._folder, self._job = source, shards_folder(out), job
        self._workers, self._runner, self._advance = workers, runner, advance

    def run(self, total: int) -> None:
        first = next((record for record, _ in self._to_ask()), None)
        if first is None:
            return
        # A wrong address, key or model shows here, before any worker is started.
        asyncio.run(ask_all([first], job=self._job, advance=self._advance))
        number = min(_MOST_SHARDS, max(self._workers, math.ceil(total / _CAPTIONS_EACH)))
        is_first_round = True
        while not self._job.stopped:
            shards = self._cut(number, is_first_round)
            if not shards:
                return
            sent, is_stopped = self._run_round(shards)
            if not is_stopped:
                return
            if len(shards) == 1:
                self._job.stopped = budget_reached(self._job.settings)
            # Shares that pay for nothing by themselves may pay for something together.
            number = self._workers if sent and number > self._workers else 1
            is_first_round = False

    def _to_ask(self, *, again: bool = True) -> Iterator[tuple[Record, str]]:
        """Yield what has no reply yet; with `again` also what failed before, for now."""
        settings, ledger = self._job.settings, self._job.ledger
        for record in declined_last(self._source, self._job):
            request = build_request(self._job.prompt, record.caption or "", model=settings.model)
            may_ask = ledger.may_ask(request.key, retry_failed=settings.retry_failed)
            if may_ask and (again or ledger.reason(request.key) is None):
                yield record, request.key

    def _cut(self, number: int, is_first_round: bool) -> list[Shard]:
        """Write what is to be asked into at most so many caption files."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # Ledgers are merged by name, once: the name must be new.
        name = uuid.uuid4().hex[:12]
        files: dict[int, TextIO] = {}
        counts: dict[int, int] = {}
        with contextlib.ExitStack() as stack:
            for record, key in self._to_ask(again=is_first_round):
                place = int(key, 16) % number
                if place not in files:
                    path = self._folder / f"{name}-{place:03d}"
                    files[place] = stack.enter_context(path.open("w", encoding="utf-8"))
                files[place].write(json.dumps(record.row(), ensure_ascii=False) + "\n")
                counts[place] = counts.get(place, 0) + 1
        return [
            Shard(Path(files[place].name), self._share(counts, place), counts[place])
            for place in sorted(counts)
        ]

    def _share(self, counts: dict[int, int], place: int) -> GenerateSettings:
        """Return a shard's settings: its share of the money and of the requests in flight."""
        settings = self._job.settings
        at_once = min(self._workers, len(counts))
        budget = settings.budget_usd
        if budget is not None:
            left = max(0.0, budget - self._job.ledger.committed_usd)
            budget = left * counts[place] / sum(counts.values())
        return dataclasses.replace(
            settings,
            budget_usd=budget,
            concurrency=max(1, settings.concurrency // at_once),
            limit=None,
            # A shard's ledger is empty: it cannot know by itself.
            is_trusted=self._job.ledger.has_reply(settings.model, self._job.prompt_identity),
        )

    def _run_round(self, shards: list[Shard]) -> tuple[int, bool]:
        """Run and merge every shard; return the requests sent, and whether money ran out."""
        sent, is_stopped, errors = 0, False, list[str]()
        for shard, result in self._runner(shards, min(self._workers, len(shards))):
            sent += merge_shard(self._job.ledger, shard.out)
            is_stopped |= bool(result.stopped)
            errors += [result.error] if result.error else []
            self._advance(shard.count, note=f"${self._job.ledger.committed_usd:.4f}")
        self._job.sent += sent
        if errors:
            raise CloverError(errors[0])
        return sent, is_stopped
