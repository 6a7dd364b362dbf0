"""Questions that need no image: the same question put to a language model that sees none.

In: pairs that passed the other rules, and an OpenAI-compatible endpoint. Out: a reason for each
pair whose answer the model gave without image or caption. Such pairs teach a model to guess.
Asking goes through the same client, ledger, budget and retries as generation: a question that
stands under a thousand images is paid once, and no question is ever paid twice.
"""

from __future__ import annotations

import asyncio
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clover.core.errors import CloverError
from clover.core.record import AnswerType, Record, Rejection
from clover.core.terminal import progress
from clover.instruct.generate import GenerateSettings, Job, ask_all, open_job
from clover.instruct.lists import load_yaml
from clover.instruct.prompt import GenerationPrompt, build_request

HABIT = 0.8
"""A model that gives one answer to more than this share of closed questions has a habit, and its
being right says nothing of the question."""
_LEAST_FOR_HABIT = 10
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_YES_NO = re.compile(r"(?<![^\W_])(yes|no)(?![^\W_])")


@dataclass
class BlindAnswers:
    """What a model that sees no image said, wording by wording."""

    replies: dict[tuple[AnswerType, str], list[str]] = field(default_factory=dict)
    """Kind and question, to the replies in the order of the wordings."""
    unanswered: int = 0
    """Questions that brought no reply; they cannot be judged."""
    sent: int = 0

    @property
    def habit(self) -> str | None:
        """The answer that the model gives whatever is asked, if it has one."""
        first = [
            said
            for (kind, _), replies in self.replies.items()
            if kind == "closed" and replies and (said := yes_or_no(replies[0]))
        ]
        if len(first) < _LEAST_FOR_HABIT:
            return None
        answer, count = Counter(first).most_common(1)[0]
        return answer if count > HABIT * len(first) else None

    def fault(self, record: Record) -> str | None:
        """Return why a pair is turned away, or None."""
        kind, question, gold = _kind(record), record.question or "", record.answer or ""
        replies = self.replies.get((kind, question), [])
        if kind == "open":
            if replies and plain_form(replies[0]) == plain_form(gold):
                return "blind: answered without the image"
            return None
        wordings = len(_wordings("closed"))
        is_right = len(replies) == wordings and all(
            yes_or_no(reply) == yes_or_no(gold) for reply in replies
        )
        if is_right and self.habit is None:
            return f"blind: answered without the image, {wordings} times of {wordings}"
        return None


def plain_form(text: str) -> str:
    """Return a text's words without case, punctuation and articles.

    Two answers are equal when these are: the strict protocol of `clover score`, which lies in
    another stage (stages never import each other; a test holds the two together).
    """
    words = [word for raw in text.lower().split() if (word := raw.translate(_PUNCTUATION))]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def yes_or_no(text: str) -> str | None:
    """Return the first whole word that is yes or no, else None."""
    found = _YES_NO.search(text.lower())
    return found.group(1) if found else None


def ask_blind(
    records: Sequence[Record], *, out: Path, settings: GenerateSettings, closed: bool = False
) -> BlindAnswers:
    """Ask the questions of records of a model that sees neither image nor caption.

    Args:
        records: Pairs; a question that stands twice is asked once.
        out: The filter's output; the ledger lies beside it, and the same call again continues.
        settings: Where and how to ask; `prompt` is not read.
        closed: Ask yes/no questions too, each until one wording is answered wrong.

    Raises:
        CloverError: the endpoint cannot be worked with, or the budget is reached.
    """
    found = BlindAnswers()
    with open_job(out, settings) as job:
        kinds: tuple[AnswerType, ...] = ("open", "closed") if closed else ("open",)
        for kind in kinds:
            golds: dict[str, set[str | None]] = {}
            for record in records:
                if _kind(record) == kind and record.question:
                    golds.setdefault(record.question, set()).add(yes_or_no(record.answer or ""))
            asked = list(golds)
            for prompt in _wordings(kind):
                replies = _ask(asked, job=replace(job, prompt=prompt), found=found)
                for question, reply in replies.items():
                    found.replies.setdefault((kind, question), []).append(reply)
                # Whoever was wrong once is not asked again.
                asked = [q for q, reply in replies.items() if yes_or_no(reply) in golds[q]]
    return found


def reject_blind(
    kept: Iterable[Record], answers: BlindAnswers, *, source: Sequence[Record]
) -> tuple[list[Record], list[Rejection]]:
    """Divide records by whether their question needs the image.

    Args:
        kept: Records that passed the other rules.
        answers: From `ask_blind`.
        source: All records in the order of their file, for the line of a rejection.
    """
    lines = {id(record): number for number, record in enumerate(source, start=1)}
    good: list[Record] = []
    rejected: list[Rejection] = []
    for record in kept:
        reason = answers.fault(record)
        if reason is None:
            good.append(record)
        else:
            line = lines.get(id(record), 0)
            rejected.append(Rejection(record.source or "", line, reason, record.row()))
    return good, rejected


def _ask(questions: Sequence[str], *, job: Job, found: BlindAnswers) -> dict[str, str]:
    """Ask each question in one wording; return the replies that came."""
    records = [Record(id=str(n), caption=question) for n, question in enumerate(questions)]
    with progress("blind", len(records)) as advance:
        asyncio.run(ask_all(records, job=job, advance=advance))
    found.sent += job.sent
    if job.stopped:
        raise CloverError(
            f"{job.stopped}: some questions are not asked yet; raise --blind-budget and run the "
            "same command again"
        )
    replies = {}
    for question in questions:
        key = build_request(job.prompt, question, model=job.settings.model).key
        stored = job.ledger.reply(key)
        if stored is None:
            found.unanswered += 1
        else:
            replies[question] = stored[0]
    return replies


def _kind(record: Record) -> AnswerType:
    return "closed" if record.answer_type == "closed" else "open"


def _wordings(kind: AnswerType) -> list[GenerationPrompt]:
    """Return the prompts of a kind: the question stands where a caption would."""
    texts = load_yaml("blind")
    return [
        GenerationPrompt(
            version=f"{texts['version']}-{kind}-{number}",
            format="answer",
            pairs=(0, 0),
            temperature=0.0,
            max_tokens=texts["max_tokens"],
            system=texts["system"],
            user=wording.replace("{question}", "{caption}"),
        )
        for number, wording in enumerate(texts[kind], start=1)
    ]
