"""Generation against endpoints, honest and hostile: nothing lost, nothing paid twice."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from clover.core.errors import CloverError
from clover.core.record import read_records
from clover.instruct.caption import Captions, plain_text
from clover.instruct.generate import GenerateSettings, generate_file, plan_file
from clover.instruct.ledger import Ledger, ledger_path
from clover.instruct.prices import Price, estimate_tokens, find_price

from .endpoint import Endpoint, Running, url

PRICE = Price(0.5, 1.5)


def captions(path: Path, count: int) -> Path:
    rows = [
        {"image": f"{i}.png", "caption": f"Liver with fatty change, case {i}, and mild fibrosis."}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(server: Endpoint, **changes: object) -> GenerateSettings:
    values = {
        "endpoint": url(server),
        "model": "small-model",
        "price": PRICE,
        "concurrency": 8,
        "timeout_s": 1.0,
        "longest_wait_s": 0.1,
        **changes,
    }
    return GenerateSettings(**values)  # type: ignore[arg-type]


def test_every_caption_brings_its_pairs_in_the_order_of_the_captions(tmp_path: Path) -> None:
    source = captions(tmp_path / "c.jsonl", 12)
    with Running(Endpoint()) as endpoint:
        summary = generate_file(source, out=tmp_path / "o.jsonl", settings=settings(endpoint))
    assert (summary.asked, summary.done, summary.failed, summary.pairs) == (12, 12, 0, 48)
    records = read_records(tmp_path / "o.jsonl", needs="question").records
    assert [r.image for r in records] == [f"{i}.png" for i in range(12) for _ in range(4)]
    assert {r.origin for r in records} == {"generated"}
    assert records[1].answer_type == "closed"
    assert records[0].answer_type == "open"


def test_second_run_sends_nothing_and_writes_the_same_file(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 10), tmp_path / "o.jsonl"
    with Running(Endpoint()) as endpoint:
        generate_file(source, out=out, settings=settings(endpoint))
        first = out.read_bytes()
        again = generate_file(source, out=out, settings=settings(endpoint))
        assert endpoint.requests == 10
    assert again.sent == 0
    assert again.done == 10
    assert out.read_bytes() == first


def test_a_caption_that_stands_twice_is_paid_once_and_answers_for_both_images(
    tmp_path: Path,
) -> None:
    rows = [{"image": f"{i}.png", "caption": "Colon with a villous adenoma."} for i in range(5)]
    source = tmp_path / "c.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Running(Endpoint(delay_s=0.05)) as endpoint:
        summary = generate_file(source, out=tmp_path / "o.jsonl", settings=settings(endpoint))
        assert endpoint.requests == 1
    assert summary.done == 5


def test_hostile_endpoint_leaves_every_caption_done_and_the_books_equal_to_the_token(
    tmp_path: Path,
) -> None:
    source, out = captions(tmp_path / "c.jsonl", 400), tmp_path / "o.jsonl"
    with Running(Endpoint(hostile=True, delay_s=0.005)) as endpoint:
        summary = generate_file(source, out=out, settings=settings(endpoint, concurrency=32))
        count = endpoint.count()
    assert min(count["kinds"].get(kind, 0) for kind in ("429", "500", "hang", "wrong_model")) > 0
    assert min(count["kinds"].get(kind, 0) for kind in ("cut_text", "cut_http", "twice")) > 0
    assert (summary.done, summary.failed, summary.left) == (400, 0, 0)
    with Ledger(ledger_path(out)) as ledger:
        totals = ledger.totals()
    assert totals.input_tokens == count["input_tokens"]
    assert totals.output_tokens == count["output_tokens"]
    assert totals.usd == pytest.approx(PRICE.dollars(count["input_tokens"], count["output_tokens"]))
    assert totals.attempts == count["requests"]
    # What never arrived is booked at its worst case, apart and marked.
    assert totals.lost == count["kinds"]["hang"] + count["kinds"]["cut_http"]
    assert totals.lost_usd > 0


def test_hostile_endpoint_gives_the_same_output_as_an_honest_one(tmp_path: Path) -> None:
    source = captions(tmp_path / "c.jsonl", 120)
    for name, hostile in (("honest", False), ("hostile", True)):
        with Running(Endpoint(hostile=hostile, seed=1)) as endpoint:
            generate_file(source, out=tmp_path / name, settings=settings(endpoint, concurrency=32))
    assert (tmp_path / "honest").read_bytes() == (tmp_path / "hostile").read_bytes()


def test_budget_is_never_overrun_and_more_money_finishes_the_rest(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 60), tmp_path / "o.jsonl"
    with Running(Endpoint(delay_s=0.01)) as endpoint:
        small = generate_file(source, out=out, settings=settings(endpoint, budget_usd=0.010))
        assert 0 < small.done < 60
        assert small.left == 60 - small.done
        assert "budget" in (small.stopped or "")
        assert small.usd + small.lost_usd <= 0.010
        # The cap is used, not merely kept: less than one worst case remains.
        assert small.usd > 0.010 - 0.004
        whole = generate_file(source, out=out, settings=settings(endpoint, budget_usd=1.0))
        assert whole.done == 60
        assert endpoint.requests == 60


def test_budget_holds_at_every_moment_of_a_hostile_run(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 300), tmp_path / "o.jsonl"
    with Running(Endpoint(hostile=True)) as endpoint:
        summary = generate_file(
            source, out=out, settings=settings(endpoint, budget_usd=0.05, concurrency=32)
        )
        spent = PRICE.dollars(endpoint.input_tokens, endpoint.output_tokens)
    assert spent <= 0.05
    assert summary.usd + summary.lost_usd <= 0.05


def test_dry_run_sends_nothing_and_is_within_a_fifth(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 50), tmp_path / "o.jsonl"
    with Running(Endpoint()) as endpoint:
        before = plan_file(source, out=out, settings=settings(endpoint))
        assert endpoint.requests == 0
        generate_file(source, out=out, settings=settings(endpoint, limit=10))
        after = plan_file(source, out=out, settings=settings(endpoint))
        summary = generate_file(source, out=out, settings=settings(endpoint))
    assert before.requests == 50
    assert after.requests == 40
    print(f"predicted ${before.usd:.5f}, then ${after.usd * 50 / 40:.5f}; was ${summary.usd:.5f}")
    assert before.usd == pytest.approx(summary.usd, rel=0.2)
    assert after.usd * 50 / 40 == pytest.approx(summary.usd, rel=0.2)


def test_endpoint_without_usage_is_estimated_and_marked(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 5), tmp_path / "o.jsonl"
    with Running(Endpoint(usage=False)) as endpoint:
        summary = generate_file(source, out=out, settings=settings(endpoint))
        counted = endpoint.input_tokens
    with Ledger(ledger_path(out)) as ledger:
        assert ledger.totals().estimated == 5
    assert summary.input_tokens == pytest.approx(counted, rel=0.2)


def test_wrong_key_stops_at_the_first_call_with_nothing_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    source, out = captions(tmp_path / "c.jsonl", 40), tmp_path / "o.jsonl"
    with Running(Endpoint(key="right")) as endpoint:
        with pytest.raises(CloverError, match="does not accept the API key"):
            generate_file(source, out=out, settings=settings(endpoint))
        assert endpoint.kinds["401"] == 1
        with Ledger(ledger_path(out)) as ledger:
            assert ledger.totals().booked_usd == 0
        monkeypatch.setenv("OPENAI_API_KEY", "right")
        assert generate_file(source, out=out, settings=settings(endpoint)).done == 40


def test_missing_key_for_another_machine_is_named_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    source = captions(tmp_path / "c.jsonl", 2)
    away = GenerateSettings(
        endpoint="https://endpoint.invalid/v1", model="m", price=PRICE, key_env="MY_KEY"
    )
    with pytest.raises(CloverError, match="MY_KEY is not set"):
        generate_file(source, out=tmp_path / "o.jsonl", settings=away)
    assert not ledger_path(tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("wrong", ["nonsense", "ftp://127.0.0.1/v1", "http://"])
def test_what_is_no_url_is_refused(tmp_path: Path, wrong: str) -> None:
    source = captions(tmp_path / "c.jsonl", 2)
    with pytest.raises(CloverError, match="is not a URL"):
        generate_file(
            source,
            out=tmp_path / "o.jsonl",
            settings=GenerateSettings(endpoint=wrong, model="m", price=PRICE),
        )


def test_wrong_address_stops_at_the_first_call(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 20), tmp_path / "o.jsonl"
    with Running(Endpoint()) as endpoint:
        wrong_path = settings(endpoint, endpoint=f"http://127.0.0.1:{endpoint.port}/v2")
        with pytest.raises(CloverError, match="no such address or model"):
            generate_file(source, out=out, settings=wrong_path)
        assert endpoint.requests == 0
        port = endpoint.port
    closed = GenerateSettings(endpoint=f"http://127.0.0.1:{port}/v1", model="m", price=PRICE)
    with pytest.raises(CloverError, match="nothing was spent"):
        generate_file(source, out=tmp_path / "p.jsonl", settings=closed)
    with Ledger(ledger_path(tmp_path / "p.jsonl")) as ledger:
        assert ledger.totals().booked_usd == 0


def test_a_server_that_calls_its_model_by_another_name_is_accepted(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 10), tmp_path / "o.jsonl"
    with Running(Endpoint(stored_model="house-name")) as endpoint:
        assert generate_file(source, out=out, settings=settings(endpoint)).done == 10


def test_unlisted_model_elsewhere_needs_a_price_and_a_listed_one_costs_its_list_price(
    tmp_path: Path,
) -> None:
    source = captions(tmp_path / "c.jsonl", 2)
    away = GenerateSettings(endpoint="https://endpoint.invalid/v1", model="unheard-of")
    with pytest.raises(CloverError, match="--price input,output"):
        plan_file(source, out=tmp_path / "o.jsonl", settings=away)
    behind = GenerateSettings(endpoint="http://127.0.0.1:1/v1", model="gpt-3.5-turbo-1106")
    assert plan_file(source, out=tmp_path / "o.jsonl", settings=behind).price.input_usd == 1.0
    local = GenerateSettings(endpoint="http://127.0.0.1:1/v1", model="unheard-of")
    assert plan_file(source, out=tmp_path / "o.jsonl", settings=local).usd == 0


def test_a_second_process_on_the_same_output_is_turned_away(tmp_path: Path) -> None:
    from clover.instruct.ledger import writing

    source, out = captions(tmp_path / "c.jsonl", 2), tmp_path / "o.jsonl"
    with (
        Running(Endpoint()) as endpoint,
        writing(ledger_path(out)),
        pytest.raises(CloverError, match="another process"),
    ):
        generate_file(source, out=out, settings=settings(endpoint))


@pytest.mark.parametrize(
    ("model", "price"),
    [
        *(("gpt-4o-2024-05-13", (5.0, 15.0)), ("openai/gpt-4o-2024-08-06", (2.5, 10.0))),
        *(("gpt-3.5-turbo-0613", (1.5, 2.0)), ("gpt-4.1-mini-2025-04-14", (0.4, 1.6))),
    ],
)
def test_a_dated_version_has_its_own_price(model: str, price: tuple[float, float]) -> None:
    found = find_price(model, is_local=False)
    assert found is not None and (found.input_usd, found.output_usd) == price


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1/v1", "https://endpoint.invalid/v1"])
def test_a_dated_version_that_is_not_listed_needs_a_price(tmp_path: Path, endpoint: str) -> None:
    source = captions(tmp_path / "c.jsonl", 2)
    chosen = GenerateSettings(endpoint=endpoint, model="gpt-4o-2031-01-01")
    with pytest.raises(CloverError, match="dated version 'gpt-4o-2031-01-01'; give --price"):
        plan_file(source, out=tmp_path / "o.jsonl", settings=chosen)
    priced = replace(chosen, price=PRICE)
    assert plan_file(source, out=tmp_path / "o.jsonl", settings=priced).usd > 0


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), -1.0])
def test_a_budget_that_is_no_number_sends_nothing(tmp_path: Path, budget: float) -> None:
    source = captions(tmp_path / "c.jsonl", 2)
    with Running(Endpoint()) as endpoint:
        chosen = settings(endpoint, budget_usd=budget)
        with pytest.raises(CloverError, match="--budget"):
            generate_file(source, out=tmp_path / "o.jsonl", settings=chosen)
        assert endpoint.requests == 0


def test_token_estimate_is_close_to_a_real_tokeniser() -> None:
    # Counted once with the SmolLM2 tokeniser (byte-level BPE, 49,152 pieces): see docs/instruct.md.
    text = (
        "In the superficial epithelium, tumor tissue that invades by forming medium-sized to "
        "small, irregular ducts is observed. Moderately differentiated adenocarcinoma."
    )
    assert estimate_tokens(text) == pytest.approx(30, rel=0.2)


def test_ledger_of_a_stranger_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "o.jsonl.ledger.sqlite"
    file.write_bytes(b"not a database at all, but long enough to be taken for one" * 20)
    with pytest.raises(CloverError, match="is not a ledger"):
        Ledger(file)


@pytest.mark.parametrize(
    "schema",
    [
        "CREATE TABLE patients (name TEXT)",
        "CREATE TABLE requests (url TEXT)",
        "CREATE TABLE attempts (id INTEGER PRIMARY KEY, key TEXT, day TEXT)",
    ],
)
def test_another_database_is_refused_in_one_line_and_left_as_it_is(
    tmp_path: Path, schema: str
) -> None:
    file = tmp_path / "o.jsonl.ledger.sqlite"
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute(schema)
    before = file.read_bytes()
    with pytest.raises(CloverError, match=r"is not a ledger: .*; move it away"):
        Ledger(file)
    assert file.read_bytes() == before


def test_ledger_books_no_attempt_twice(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 30), tmp_path / "o.jsonl"
    with Running(Endpoint(hostile=True, seed=3)) as endpoint:
        generate_file(source, out=out, settings=settings(endpoint, concurrency=16))
    with sqlite3.connect(ledger_path(out)) as database:
        rows = database.execute(
            "SELECT key, SUM(state = 'settled' AND note IS NULL), SUM(state = 'reserved') "
            "FROM attempts GROUP BY key"
        ).fetchall()
    assert {(usable, reserved) for _, usable, reserved in rows} == {(1, 0)}


def test_where_images_lie_is_found_without_cleaning_the_captions_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaned = 0

    def counted(text: str) -> str:
        nonlocal cleaned
        cleaned += 1
        return plain_text(text)

    monkeypatch.setattr("clover.instruct.caption.plain_text", counted)
    (tmp_path / "own").mkdir()
    source = Captions(captions(tmp_path / "own" / "c.jsonl", 20), out=tmp_path / "o.jsonl")
    assert (len(list(source)), cleaned) == (20, 20)
