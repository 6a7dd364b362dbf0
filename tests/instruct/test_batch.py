"""The Batch API: results in any order, errors alone, and a process that dies in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from clover.core.errors import CloverError
from clover.instruct.batch import BatchSettings
from clover.instruct.generate import GenerateSettings, generate_file, plan_file
from clover.instruct.ledger import Ledger, Worst, ledger_path
from clover.instruct.shard import generate_in_shards
from clover.instruct.workers import run_locally

from .endpoint import Endpoint, Running, url
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
        _give_up_waiting(source, out, impatient)
        assert len(endpoint.batches) == 1
        endpoint.batches["batch-0"]["_polls"] = 1
        endpoint.batch_polls = 1
        summary = generate_file(source, out=out, settings=impatient)
        assert len(endpoint.batches) == 1
    assert summary.done == 10


def test_a_run_without_batches_leaves_alone_what_waits_in_one(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 10), tmp_path / "o"
    with Running(Endpoint(batch_polls=10**9)) as endpoint:
        _give_up_waiting(source, out, settings(endpoint, batch=QUICK))
        more = captions(tmp_path / "c.jsonl", 12)
        plain = settings(endpoint)
        plan = plan_file(more, out=out, settings=plain)
        assert (plan.requests, plan.waiting) == (2, 10)
        summary = generate_file(more, out=out, settings=plain)
        assert (summary.sent, summary.done, summary.left, summary.waiting) == (2, 2, 10, 10)
        endpoint.batches["batch-0"]["_polls"] = 1
        assert generate_file(more, out=out, settings=settings(endpoint, batch=QUICK)).done == 12
        assert set(endpoint.asked.values()) == {1}


def test_workers_leave_alone_what_waits_in_a_batch(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 5), tmp_path / "o"
    with Running(Endpoint(batch_polls=10**9)) as endpoint:
        _give_up_waiting(source, out, settings(endpoint, batch=QUICK))
        summary = generate_in_shards(
            source, out=out, settings=settings(endpoint), workers=2, runner=run_locally
        )
        assert endpoint.requests == 0
    assert (summary.sent, summary.waiting) == (0, 5)


def test_a_batch_that_nobody_knows_any_more_is_booked_as_lost_and_asked_anew(
    tmp_path: Path,
) -> None:
    source, out = captions(tmp_path / "c.jsonl", 10), tmp_path / "o"
    with Running(Endpoint(batch_polls=10**9)) as endpoint:
        chosen = settings(endpoint, batch=QUICK)
        _give_up_waiting(source, out, chosen)
        endpoint.batches.clear()
        endpoint.batch_polls = 1
        told = generate_file(source, out=out, settings=chosen)
        assert (told.sent, told.failed, told.usd) == (0, 10, 0) and told.lost_usd > 0
        assert "no longer knows batch" in Path(f"{out}.failed.jsonl").read_text()
        again = generate_file(source, out=out, settings=chosen)
    assert (again.done, again.lost_usd) == (10, told.lost_usd)


def test_a_batch_of_another_endpoint_is_not_given_up(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 10), tmp_path / "o"
    with Running(Endpoint(batch_polls=10**9)) as endpoint, Running(Endpoint()) as other:
        chosen = settings(endpoint, batch=QUICK)
        _give_up_waiting(source, out, chosen)
        for wrong in (url(other), url(endpoint).replace("/v1", "/v2")):
            with pytest.raises(CloverError, match=f"give --endpoint {url(endpoint)}"):
                elsewhere = settings(endpoint, batch=QUICK, endpoint=wrong)
                generate_file(source, out=out, settings=elsewhere)
        endpoint.batches["batch-0"]["_polls"] = 1
        assert generate_file(source, out=out, settings=chosen).done == 10


def _give_up_waiting(source: Path, out: Path, chosen: GenerateSettings) -> None:
    """Send batches, and be stopped while they are waited for."""

    async def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clover.instruct.batch._Runner.collect", stop)
        with pytest.raises(KeyboardInterrupt):
            generate_file(source, out=out, settings=chosen)


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
