"""Bookings that share a commit: still before the request is sent, and all or none."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clover.instruct.commit import GroupCommit
from clover.instruct.generate import generate_file
from clover.instruct.ledger import Ledger, Worst, ledger_path

from .endpoint import Endpoint, Running
from .test_generate import PRICE, captions, settings


@dataclass
class Witness(Endpoint):
    """Looks into the ledger, as another process would, whenever a request arrives."""

    ledger: Path = Path()
    unbooked: list[str] = field(default_factory=list)

    async def _chat(self, writer: Any, body: dict[str, Any]) -> bool:
        with contextlib.closing(sqlite3.connect(self.ledger)) as database:
            (booked,) = database.execute("SELECT COUNT(*) FROM attempts").fetchone()
        if booked <= self.requests:
            self.unbooked.append(body["messages"][-1]["content"])
        return await super()._chat(writer, body)


def test_every_request_is_in_the_file_before_it_reaches_the_endpoint(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 120), tmp_path / "o.jsonl"
    with Running(Witness(ledger=ledger_path(out), delay_s=0.005)) as endpoint:
        generate_file(source, out=out, settings=settings(endpoint, concurrency=16))
        assert endpoint.requests == 120
        assert endpoint.unbooked == []


def test_bookings_of_one_turn_share_a_commit(tmp_path: Path) -> None:
    said: list[str] = []

    async def book(ledger: Ledger, key: str) -> None:
        worst = Worst(10, 10)
        attempt = ledger.reserve(
            key, request=("m", "p", "e"), worst=worst, price=PRICE, budget=None
        )
        assert attempt is not None
        await ledger.committed()
        with contextlib.closing(sqlite3.connect(ledger.path)) as other:
            states = other.execute("SELECT state FROM attempts WHERE key = ?", (key,)).fetchall()
        assert states == [("reserved",)]
        ledger.settle(attempt, tokens=(1, 1), reply="r")

    async def run(ledger: Ledger) -> None:
        with ledger.grouped():
            await asyncio.gather(*[book(ledger, str(number)) for number in range(10)])

    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger._db.set_trace_callback(said.append)
        asyncio.run(run(ledger))
        ledger._db.set_trace_callback(None)
        assert ledger.totals().done == 10
    # Ten reservations in one, ten settlements in one or a few: without groups it were twenty.
    assert 2 <= said.count("COMMIT") <= 4


def test_a_commit_that_fails_fails_for_all_who_wait_and_books_nothing() -> None:
    async def run() -> list[BaseException | None]:
        database = sqlite3.connect(":memory:", isolation_level=None)
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("CREATE TABLE a (id INTEGER PRIMARY KEY)")
        database.execute("CREATE TABLE b (a REFERENCES a (id) DEFERRABLE INITIALLY DEFERRED)")
        group = GroupCommit(database)

        async def book(number: int) -> None:
            group.begin()
            database.execute("INSERT INTO b VALUES (?)", (number,))
            await group.committed()

        found = await asyncio.gather(*[book(n) for n in range(3)], return_exceptions=True)
        assert database.execute("SELECT COUNT(*) FROM b").fetchone() == (0,)
        # And the next group is a new one.
        group.begin()
        database.execute("INSERT INTO a VALUES (7)")
        await group.committed()
        assert not database.in_transaction
        return found

    assert [type(error) for error in asyncio.run(run())] == [sqlite3.IntegrityError] * 3


def test_one_who_is_cancelled_does_not_cancel_the_others() -> None:
    async def run() -> None:
        database = sqlite3.connect(":memory:", isolation_level=None)
        database.execute("CREATE TABLE a (id INTEGER)")
        group = GroupCommit(database)
        group.begin()
        database.execute("INSERT INTO a VALUES (1)")
        tasks = [asyncio.create_task(group.committed()) for _ in range(2)]
        asyncio.get_running_loop().call_soon(tasks[0].cancel)
        await asyncio.wait(tasks)
        assert tasks[1].exception() is None

    asyncio.run(run())


def test_half_a_booking_is_not_committed_with_the_others(tmp_path: Path) -> None:
    async def run(ledger: Ledger) -> None:
        with ledger.grouped():
            numbers = [
                ledger.reserve(
                    key, request=("m", "p", "e"), worst=Worst(10, 10), price=PRICE, budget=None
                )
                for key in ("good", "bad")
            ]
            assert numbers == [1, 2]
            ledger.settle(1, tokens=(1, 1), reply="r")
            with pytest.raises(UnicodeEncodeError):
                ledger.settle(2, tokens=(1, 1), reply="\ud83d")

    with Ledger(tmp_path / "l.sqlite") as ledger:
        asyncio.run(run(ledger))
        committed = ledger.committed_usd
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert ledger.outcome("good") == "done" and ledger.outcome("bad") == "open"
        states = ledger._db.execute("SELECT state FROM attempts ORDER BY id").fetchall()
        assert states == [("settled",), ("reserved",)]
        assert ledger.committed_usd == pytest.approx(committed)


@pytest.mark.parametrize("budget", [0.0004, 0.004])
def test_a_budget_holds_within_a_group(tmp_path: Path, budget: float) -> None:
    source, out = captions(tmp_path / "c.jsonl", 30), tmp_path / "o.jsonl"
    with Running(Endpoint()) as endpoint:
        generate_file(
            source, out=out, settings=settings(endpoint, budget_usd=budget, concurrency=32)
        )
    with Ledger(ledger_path(out)) as ledger:
        assert ledger.totals().booked_usd <= budget
