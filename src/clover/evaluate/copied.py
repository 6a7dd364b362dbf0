"""Whether answers are copied from training: by the same question, or whole sentences.

In: training questions with answers. Out: counts that a copier is charged by (`expose`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clover.evaluate.form import answer_form, question_form
from clover.evaluate.item import field, text_of
from clover.evaluate.protocol import Item
from clover.evaluate.protocol.normalise import first_yes_no

LOOKUPS = ("commonest", "first", "last")
LONG = 4
"""Words of a training answer that nobody gives by chance."""


class TrainingAnswers:
    """What the training questions were answered, by the question's words."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        answers: dict[str, list[str]] = defaultdict(list)
        self._long_answers: set[str] = set()
        for row in rows:
            question, answer = text_of(field(row, "question")), text_of(field(row, "answer"))
            if not question or not answer:
                continue
            form = answer_form(answer)
            answers[question_form(question)].append(form)
            if _is_long(form):
                self._long_answers.add(form)
        self._of_question = {
            question: (Counter(given).most_common(1)[0][0], given[0], given[-1])
            for question, given in answers.items()
        }

    def __len__(self) -> int:
        return len(self._of_question)

    def compare(
        self,
        items: Sequence[Item],
        questions: Sequence[str],
        said: Sequence[str],
        true: Sequence[str],
    ) -> Counter[tuple[str | None, ...]]:
        """Compare answers with those that training would give.

        Args:
            items: A chunk.
            questions: Their forms.
            said: What was said, in its form.
            true: What is true, in its form.

        Returns:
            ("wrong", lookup) and ("copied", lookup), for each of `LOOKUPS`; and over long answers
            ("long", "wrong"), ("long", "copied"), ("long", "truths"), ("long", "known truths").
        """
        counts: Counter[tuple[str | None, ...]] = Counter()
        for item, question, heard, right in zip(items, questions, said, true, strict=True):
            for name, learnt in zip(LOOKUPS, self._of_question.get(question, ()), strict=False):
                answer = first_yes_no(learnt) or learnt if item.is_closed else learnt
                if answer != right:
                    counts["wrong", name] += 1
                    counts["copied", name] += heard == answer
            if item.is_closed:
                continue
            if heard != right and _is_long(heard):
                counts["long", "wrong"] += 1
                counts["long", "copied"] += heard in self._long_answers
            if _is_long(right):
                counts["long", "truths"] += 1
                counts["long", "known truths"] += right in self._long_answers
        return counts


def _is_long(form: str) -> bool:
    return form.count(" ") + 1 >= LONG
