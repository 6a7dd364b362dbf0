"""Questions that a model answers without the image: asked once, paid once, turned away by name."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clover.cli import main
from clover.core.errors import CloverError
from clover.core.record import Record
from clover.evaluate.protocol.normalise import first_yes_no, strict_words
from clover.instruct.blind import ask_blind, plain_form, reject_blind, yes_or_no
from clover.instruct.generate import GenerateSettings
from clover.instruct.ledger import Ledger, ledger_path
from clover.instruct.lists import load_yaml
from clover.instruct.prices import Price

from .endpoint import Endpoint, Running, count_tokens, url

WORDINGS = len(load_yaml("blind")["closed"])


@dataclass
class Guesser(Endpoint):
    """An endpoint that sees nothing and knows some answers by heart."""

    known: dict[str, list[str]] = field(default_factory=dict)
    """Question to its answers, in the order in which it is asked; the last one stays."""
    default: str = "I cannot say"
    heard: list[str] = field(default_factory=list)

    def _completion(self, body: dict[str, Any], kind: str) -> dict[str, Any]:
        reply = super()._completion(body, kind)
        text = body["messages"][-1]["content"]
        self.heard.append(json.dumps(body["messages"]))
        question = next((q for q in self.known if q in text), None)
        answers = self.known.get(question or "", [self.default])
        said = answers.pop(0) if len(answers) > 1 else answers[0]
        if kind != "cut_text":
            reply["choices"][0]["message"]["content"] = said
            reply["_counted"] = (reply["_counted"][0], count_tokens(said))
            reply["usage"]["completion_tokens"] = reply["_counted"][1]
        return reply


def pair(number: int, question: str, answer: str) -> Record:
    kind = "closed" if answer in ("Yes", "No") else "open"
    return Record(
        id=str(number),
        image=f"{number}.png",
        caption=f"Secret caption {number}: {answer}",
        question=question,
        answer=answer,
        answer_type=kind,  # type: ignore[arg-type]
    )


def settings(server: Endpoint, **changes: Any) -> GenerateSettings:
    values = {"model": "m", "price": Price(0.5, 1.5), "timeout_s": 1.0, "longest_wait_s": 0.1}
    return GenerateSettings(endpoint=url(server), **{**values, **changes})


def judged(
    records: list[Record], server: Endpoint, out: Path, *, closed: bool = False, **changes: Any
) -> tuple[set[str], dict[str, str]]:
    answers = ask_blind(records, out=out, settings=settings(server, **changes), closed=closed)
    kept, rejected = reject_blind(records, answers, source=records)
    return {r.id for r in kept}, {r.content["id"]: r.reason for r in rejected}


def test_an_open_question_answered_blindly_is_turned_away_and_no_other(tmp_path: Path) -> None:
    records = [
        pair(1, "What is the usual stain of histology?", "Hematoxylin and eosin."),
        pair(2, "Which cells fill the alveoli?", "Macrophages."),
        pair(3, "What is the usual stain of histology?", "Congo red."),
        pair(4, "Is there necrosis?", "Yes"),
    ]
    known = {"usual stain": ["The hematoxylin and eosin"], "Is there": ["Yes"]}
    with Running(Guesser(known=known)) as server:
        kept, rejected = judged(records, server, tmp_path / "g.jsonl")
        # Closed questions are left alone, and a question that stands twice is asked once.
        assert server.requests == 2
    assert kept == {"2", "3", "4"}
    assert rejected == {"1": "blind: answered without the image"}


def test_neither_caption_nor_answer_is_told(tmp_path: Path) -> None:
    records = [pair(1, "Which cells are seen?", "Plasma cells."), pair(2, "Is it fat?", "No")]
    with Running(Guesser()) as server:
        judged(records, server, tmp_path / "g.jsonl", closed=True)
        assert server.heard
        for text in server.heard:
            assert "Secret" not in text
            assert "Plasma" not in text


def test_a_closed_question_falls_only_when_every_wording_is_answered_right(tmp_path: Path) -> None:
    records = [
        pair(1, "Is the heart a muscle?", "Yes"),
        pair(2, "Is this tissue inflamed?", "Yes"),
        pair(3, "Is this fibrosis?", "No"),
    ]
    known = {
        "heart": ["Yes"],
        "inflamed": [*["yes"] * (WORDINGS - 1), "No."],
        "fibrosis": ["Yes, it is."],
    }
    with Running(Guesser(known=known)) as server:
        kept, rejected = judged(records, server, tmp_path / "g.jsonl", closed=True, concurrency=1)
        # The third was wrong at once and is not asked again.
        assert server.requests == 2 * WORDINGS + 1
    assert kept == {"2", "3"}
    assert rejected["1"].startswith("blind: answered without the image")


def test_a_model_that_always_says_yes_has_a_habit_and_turns_nothing_away(tmp_path: Path) -> None:
    records = [pair(n, f"Is there sign {n}?", "Yes" if n % 2 else "No") for n in range(20)]
    with Running(Guesser(default="Yes")) as server:
        answers = ask_blind(
            records, out=tmp_path / "g.jsonl", settings=settings(server), closed=True
        )
    assert answers.habit == "yes"
    assert reject_blind(records, answers, source=records)[1] == []


def test_chance_alone_turns_few_closed_questions_away(tmp_path: Path) -> None:
    rng = random.Random(0)
    records = [pair(n, f"Is there sign {n:03}?", rng.choice(["Yes", "No"])) for n in range(200)]
    coins = {f"sign {n:03}": [rng.choice(["Yes", "No"]) for _ in range(9)] for n in range(200)}
    with Running(Guesser(known=coins)) as server:
        _, rejected = judged(records, server, tmp_path / "g.jsonl", closed=True)
    # 200 / 2^5 = 6.25 are expected; 16 would be four standard deviations off.
    assert len(rejected) <= 16


def test_a_second_run_asks_nothing_and_judges_alike(tmp_path: Path) -> None:
    records = [pair(n, f"Which cell {n}?", "Macrophages.") for n in range(12)]
    known = {f"cell {n}?": ["macrophages" if n % 3 == 0 else "none"] for n in range(12)}
    with Running(Guesser(known=known, hostile=True)) as server:
        first = judged(records, server, tmp_path / "g.jsonl", attempts=20)
        sent = server.requests
        assert judged(records, server, tmp_path / "g.jsonl", attempts=20) == first
        assert server.requests == sent
        with Ledger(ledger_path(tmp_path / "g.jsonl")) as ledger:
            totals = ledger.totals()
        assert totals.input_tokens == server.input_tokens
        assert totals.output_tokens == server.output_tokens
    assert set(first[1]) == {"0", "3", "6", "9"}


def test_the_budget_holds_and_more_money_finishes(tmp_path: Path) -> None:
    records = [pair(n, f"Which cell {n}?", "Macrophages.") for n in range(30)]
    with Running(Guesser(default="macrophages")) as server:
        with pytest.raises(CloverError, match="raise --blind-budget"):
            judged(records, server, tmp_path / "g.jsonl", budget_usd=0.0005)
        with Ledger(ledger_path(tmp_path / "g.jsonl")) as ledger:
            assert 0 < ledger.totals().booked_usd <= 0.0005
        _, rejected = judged(records, server, tmp_path / "g.jsonl", budget_usd=1.0)
        assert server.requests == 30
    assert len(rejected) == 30


@pytest.mark.parametrize(
    "text",
    [
        "The liver.",
        "A",
        "Well-differentiated, of the",
        "H&E (hematoxylin)",
        "",
        " an  Islet ",
        "3.5 %",
    ],
)
def test_equality_is_that_of_the_strict_protocol(text: str) -> None:
    assert plain_form(text) == " ".join(strict_words(text))
    for said in (f"{text} Yes.", f"no {text}", text):
        assert yes_or_no(said) == first_yes_no(said)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_the_command_counts_names_and_can_take_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "f.jsonl", tmp_path / "g.jsonl"
    records = [
        pair(1, "Which organ is shown here?", "Liver."),
        pair(2, "Which organ is shown here?", "Spleen."),
        pair(3, "Which organ is it, then?", "Liver."),
    ]
    source.write_text("".join(json.dumps(record.row()) + "\n" for record in records))
    review = tmp_path / "review.jsonl"
    review.write_text('{"id": "3", "verdict": "keep"}\n')
    with Running(Guesser(default="liver")) as server:
        words = ("instruct", "filter", source, "--out", out, "--review", review)
        words = (*words, "--blind-endpoint", url(server), "--blind-model", "m")
        assert run(*words) == 0
        text = capsys.readouterr().out
        assert "1 blind" in text
        assert "asked without the image: 1 open questions, 1 requests sent" in text
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["2", "3"]
    [gone] = [json.loads(line) for line in Path(f"{out}.rejected.jsonl").read_text().splitlines()]
    assert gone["reason"].startswith("blind")
    assert gone["line"] == 1
    assert Record.model_validate(gone["content"]) == records[0]


def test_half_an_endpoint_and_a_wrong_one_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "f.jsonl", tmp_path / "g.jsonl"
    source.write_text(json.dumps(pair(1, "Which organ is shown here?", "Liver.").row()) + "\n")
    words = ("instruct", "filter", source, "--out", out)
    assert run(*words, "--blind-model", "m") == 2
    assert "both --blind-endpoint and --blind-model" in capsys.readouterr().err
    away = ("--blind-endpoint", "http://127.0.0.1:1/v1", "--blind-model", "m")
    assert run(*words, *away) == 2
    error = capsys.readouterr().err
    assert "nothing was spent" in error
    assert error.count("\n") == 1
    assert not out.exists()
