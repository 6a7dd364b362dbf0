"""What an endpoint may answer besides a reply: no money, no leave, half a letter, no count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clover.core.errors import CloverError
from clover.core.record import read_records
from clover.instruct.generate import generate_file, plan_file
from clover.instruct.ledger import Ledger, ledger_path

from .endpoint import Endpoint, Running
from .test_generate import captions, settings

NO_CREDIT = {"error": {"message": "Insufficient Balance"}}
MODERATED = {"error": {"message": "flagged by moderation"}}


def no_fault(number: int, caption: str) -> tuple[int, Any] | None:
    return None


@dataclass
class Faulty(Endpoint):
    """Answers with an error of one's choice, by the number of the request or by its caption."""

    fault: Callable[[int, str], tuple[int, Any] | None] = no_fault
    change: Callable[[dict[str, Any]], None] | None = None

    async def _chat(self, writer: Any, body: dict[str, Any]) -> bool:
        found = self.fault(self.requests + 1, body["messages"][-1]["content"])
        if found is None:
            return await super()._chat(writer, body)
        self.requests += 1
        return await self._send(writer, *found)

    def _completion(self, body: dict[str, Any], kind: str) -> dict[str, Any]:
        reply = super()._completion(body, kind)
        if self.change is not None:
            self.change(reply)
        return reply


@pytest.mark.parametrize("answered", [0, 20])
def test_no_credit_stops_the_run_and_fails_no_caption(tmp_path: Path, answered: int) -> None:
    source, out = captions(tmp_path / "c.jsonl", 60), tmp_path / "o.jsonl"
    broke = Faulty(fault=lambda number, _: (402, NO_CREDIT) if number > answered else None)
    with Running(broke) as endpoint:
        with pytest.raises(CloverError, match="no money left"):
            generate_file(source, out=out, settings=settings(endpoint, concurrency=1))
        with Ledger(ledger_path(out)) as ledger:
            assert (ledger.totals().done, ledger.totals().failed) == (answered, 0)
        broke.fault = no_fault  # topped up
        assert generate_file(source, out=out, settings=settings(endpoint)).done == 60


@pytest.mark.parametrize("place", [0, 7])
def test_one_caption_that_is_forbidden_is_declined_and_the_others_are_answered(
    tmp_path: Path, place: int
) -> None:
    source, out = captions(tmp_path / "c.jsonl", 20), tmp_path / "o.jsonl"
    with Running(
        Faulty(fault=lambda _, text: (403, MODERATED) if f"case {place}," in text else None)
    ) as endpoint:
        first = generate_file(source, out=out, settings=settings(endpoint))
        assert (first.done, first.failed, first.left) == (19, 1, 0)
        assert generate_file(source, out=out, settings=settings(endpoint)).sent == 0
    assert "flagged by moderation" in Path(f"{out}.failed.jsonl").read_text()


def test_an_endpoint_that_declines_everything_leaves_nothing_failed_for_good(
    tmp_path: Path,
) -> None:
    source, out = captions(tmp_path / "c.jsonl", 20), tmp_path / "o.jsonl"
    fussy = Faulty(fault=lambda *_: (422, {"error": {"message": "no such field"}}))
    with Running(fussy) as endpoint:
        with pytest.raises(CloverError, match="declines every request"):
            generate_file(source, out=out, settings=settings(endpoint, concurrency=1))
        assert endpoint.requests == 3
        fussy.fault = no_fault
        assert generate_file(source, out=out, settings=settings(endpoint)).done == 20


def test_declined_captions_stop_no_later_run_of_a_prompt_that_was_answered(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 20), tmp_path / "o.jsonl"
    fussy = Faulty(fault=lambda *_: (400, MODERATED))
    with Running(fussy) as endpoint:
        fussy.fault = no_fault
        generate_file(source, out=out, settings=settings(endpoint, limit=5))
        fussy.fault = lambda *_: (400, MODERATED)
        again = generate_file(source, out=out, settings=settings(endpoint))
    assert (again.done, again.failed, again.left) == (5, 15, 0)


def forbidding(places: range) -> Faulty:
    return Faulty(
        fault=lambda _, text: (
            (400, MODERATED) if any(f"case {place}," in text for place in places) else None
        )
    )


def test_declined_captions_at_the_head_of_a_file_keep_no_later_run_from_the_others(
    tmp_path: Path,
) -> None:
    source, out = captions(tmp_path / "c.jsonl", 6), tmp_path / "o.jsonl"
    with Running(forbidding(range(3))) as endpoint:
        chosen = settings(endpoint, concurrency=1)
        with pytest.raises(CloverError, match="the same command goes on with the others"):
            generate_file(source, out=out, settings=chosen)
        again = generate_file(source, out=out, settings=chosen)
        assert (again.done, again.failed, again.left) == (3, 3, 0)
        assert generate_file(source, out=out, settings=chosen).sent == 0


def test_half_a_letter_is_stored_as_a_mark_and_paid_once(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 5), tmp_path / "o.jsonl"

    def break_letters(reply: dict[str, Any]) -> None:
        message = reply["choices"][0]["message"]
        message["content"] = message["content"].replace("Yes.", "Yes \ud83d.")

    with Running(Faulty(change=break_letters)) as endpoint:
        assert generate_file(source, out=out, settings=settings(endpoint)).done == 5
        assert generate_file(source, out=out, settings=settings(endpoint)).sent == 0
    answers = [record.answer for record in read_records(out, needs="question").records]
    assert answers.count("Yes \ufffd.") == 5


def test_half_a_letter_in_an_error_is_a_note_like_any_other(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 3), tmp_path / "o.jsonl"
    told = (500, {"error": {"message": "oops \ud83d"}})
    with Running(Faulty(fault=lambda number, _: told if number == 2 else None)) as endpoint:
        assert generate_file(source, out=out, settings=settings(endpoint)).done == 3


@pytest.mark.parametrize("count", [10**30, 2**31, -5_000_000, True, 3.5, "12", None])
def test_what_is_no_count_of_tokens_is_estimated_as_if_it_were_absent(
    tmp_path: Path, count: object
) -> None:
    source, out = captions(tmp_path / "c.jsonl", 4), tmp_path / "o.jsonl"

    def miscount(reply: dict[str, Any]) -> None:
        reply["usage"] = {"prompt_tokens": count, "completion_tokens": 10}

    with Running(Endpoint(usage=False)) as endpoint:
        generate_file(source, out=tmp_path / "absent.jsonl", settings=settings(endpoint))
    with Running(Faulty(change=miscount)) as endpoint:
        generate_file(source, out=out, settings=settings(endpoint))
    with Ledger(ledger_path(out)) as books, Ledger(ledger_path(tmp_path / "absent.jsonl")) as other:
        assert books.totals() == other.totals()
        assert books.totals().estimated == 4 and books.totals().usd > 0


def test_a_run_that_brings_nothing_leaves_the_output_of_another_model_alone(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 10), tmp_path / "o.jsonl"
    with Running(Faulty()) as endpoint:
        generate_file(source, out=out, settings=settings(endpoint))
        good = out.read_bytes()
        chosen = settings(endpoint, model="other-model")
        endpoint.fault = lambda *_: (422, {"error": {"message": "no such field"}})
        with pytest.raises(CloverError, match="declines every request"):
            generate_file(source, out=out, settings=chosen)
        assert out.read_bytes() == good
    with pytest.raises(CloverError, match="cannot connect"):
        generate_file(source, out=out, settings=chosen)
    assert good and out.read_bytes() == good


def test_a_dry_run_counts_what_retry_failed_would_send(tmp_path: Path) -> None:
    source, out = captions(tmp_path / "c.jsonl", 10), tmp_path / "o.jsonl"
    with Running(
        Faulty(fault=lambda number, _: (400, MODERATED) if number in (4, 5, 6) else None)
    ) as endpoint:
        assert generate_file(source, out=out, settings=settings(endpoint)).failed == 3
        for retry_failed, requests in ((False, 0), (True, 3)):
            chosen = settings(endpoint, retry_failed=retry_failed)
            assert plan_file(source, out=out, settings=chosen).requests == requests
        assert generate_file(source, out=out, settings=chosen).sent == 3
