"""The Batch API: results in any order, errors alone, and a process that dies in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from clover.core.errors import CloverError
from clover.instruct.batch import BatchSettings
from clover.instruct.generate import generate_file
from clover.instruct.ledger import Ledger, Worst, ledger_path

from .endpoint import Endpoint, Running
from .test_generate import PRICE, captions, settings

QUICK = BatchSettings(max_requests=15, poll_s=0.05)


def test_batches_bring_the_same_pairs_at_half_the_price(tmp_path: Path) -> None:
    source = captions(tmp_path / "c.jsonl", 40)
    with Running(Endpoint(batch_polls=2)) as endpoint:
        single = generate_file(source, out=tmp_path / "a", settings=settings(endpoint))
        batch = generate_file(source, out=tmp_path / "b", settings=settings(endpoint, batch=QUICK))
        assert len(endpoint.batches) == 3
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert batch.input_tokens == single.input_tokens
    assert batch.usd == pytest.approx(single.usd / 2)


def test_a_batch_with_only_an_error_file_lists_its_captions_and_costs_nothing(
    tmp_path: Path,
) -> None:
    source, out = captions(tmp_path / "c.jsonl", 10), tmp_path / "o"
    with Running(Endpoint(batch_only_errors=True)) as endpoint:
        summary = generate_file(source, out=out, settings=settings(endpoint, batch=QUICK))
        assert (summary.done, summary.failed, summary.usd) == (0, 10, 0)
        endpoint.batch_only_errors = False
        again = generate_file(source, out=out, settings=settings(endpoint, batch=QUICK))
    assert (again.done, again.failed) == (10, 0)


def test_another_process_takes_up_an_open_batch_and_pays_nothing_twice(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 10), tmp_path / "o"
    with Running(Endpoint(batch_polls=10**9)) as endpoint:
        impatient = settings(endpoint, batch=QUICK)
        with pytest.raises(TimeoutError):
            _give_up_after(0.6, source, out, impatient)
        assert len(endpoint.batches) == 1
        endpoint.batches["batch-0"]["_polls"] = 1
        endpoint.batch_polls = 1
        summary = generate_file(source, out=out, settings=impatient)
        assert len(endpoint.batches) == 1
    assert summary.done == 10


def _give_up_after(seconds: float, source: Path, out: Path, chosen: object) -> None:
    import signal

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        generate_file(source, out=out, settings=chosen)  # type: ignore[arg-type]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_batch_created_but_not_noted_is_found_by_its_name(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 5), tmp_path / "o"
    with Running(Endpoint()) as endpoint:
        chosen = settings(endpoint, batch=QUICK)
        generate_file(source, out=out, settings=chosen)
        with Ledger(ledger_path(out)) as ledger:
            name = ledger._db.execute("SELECT name FROM batches").fetchone()[0]
            # As if the process had died between creating the batch and writing its number down.
            ledger._db.execute("UPDATE batches SET remote = NULL, state = 'open'")
            ledger._db.execute("UPDATE attempts SET state = 'reserved', usd = 0")
            ledger._db.execute("UPDATE requests SET outcome = 'open', reply = NULL")
        assert endpoint.batches["batch-0"]["metadata"] == {"clover": name}
        summary = generate_file(source, out=out, settings=chosen)
        assert len(endpoint.batches) == 1
    assert summary.done == 5


def test_a_batch_that_was_never_created_is_asked_anew(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 5), tmp_path / "o"
    with Ledger(ledger_path(out)) as ledger:
        ledger.note_batch("never-sent")
        ledger.reserve(
            "some-key",
            request=("small-model", "p", "e"),
            worst=Worst(100, 100),
            price=PRICE,
            budget=None,
            batch="never-sent",
        )
    with Running(Endpoint()) as endpoint:
        summary = generate_file(source, out=out, settings=settings(endpoint, batch=QUICK))
    assert summary.done == 5
    with Ledger(ledger_path(out)) as ledger:
        assert ledger.open_batches() == []
        assert ledger.totals().lost == 0


def test_an_endpoint_without_batches_says_so(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 5), tmp_path / "o"
    with Running(Endpoint(key="right")) as endpoint, pytest.raises(CloverError, match="refused"):
        generate_file(source, out=out, settings=settings(endpoint, batch=QUICK))
