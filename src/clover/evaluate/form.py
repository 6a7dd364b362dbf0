"""The forms by which two questions, or two answers, are the same or not."""

from __future__ import annotations

from clover.evaluate.protocol.strict import strict_form

_LONGEST = 200


def question_form(question: str) -> str:
    """Return a question's words, by which two questions are the same or not."""
    return " ".join(question.lower().split())


def answer_form(text: str) -> str:
    """Return an answer's normal form; of an essay only the lower-case text, which is cheaper."""
    return strict_form(text) if len(text) <= _LONGEST else question_form(text)
