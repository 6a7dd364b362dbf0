"""Worked examples before the image, chosen from the training data.

A frozen language model is not taught what a visual token is; it is shown. Each example lays an
answer where the image will stand, spelt as the bridge learns to spell it (`spelling`), asks a
question of the training data, and answers. A model of 135M parameters then reads every answer that
it has seen an example of, and few others: so there is one for each frequent answer.
Measured in docs/decisions/0008.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import islice, zip_longest
from typing import NamedTuple

from clover.core.config import PromptConfig
from clover.core.record import Record
from clover.core.record_file import columns
from clover.language.prompt import EXAMPLES, turn_end

_CLOSED_SHARE = 4
"""One example in so many is a closed question, where there are enough answers of the other kind."""


class Example(NamedTuple):
    """One worked example."""

    question: str
    answer: str


def choose_examples(
    records: Sequence[Record], limit: int, *, fits: Callable[[str], bool]
) -> list[Example]:
    """Return one example for each of the most frequent answers, several for yes and no.

    Questions of one form stand apart, closed ones evenly among the others.

    Args:
        records: Training questions with answers.
        limit: Examples at most.
        fits: Whether an answer can be spelt.
    """
    asked: dict[bool, dict[str, Counter[str]]] = {True: {}, False: {}}
    for question, answer, answer_type in columns(records, "question", "answer", "answer_type"):
        question, answer = question or "", answer or ""
        if answer and "{" not in (text := question + answer) and "}" not in text:
            by_answer = asked[answer_type == "closed"]
            by_answer.setdefault(answer, Counter())[question] += 1
    used: Counter[str] = Counter()

    def next_question(questions: Counter[str]) -> str:
        chosen = min(questions, key=lambda text: (used[text], -questions[text], text))
        used[chosen] += 1
        return chosen

    def frequent(by_answer: dict[str, Counter[str]], most: int) -> list[str]:
        ordered = sorted(by_answer, key=lambda answer: (-by_answer[answer].total(), answer))
        # Whether an answer fits costs many tokenisations: only as many are tried as are needed.
        return list(islice(filter(fits, ordered), most))

    closed_answers = frequent(asked[True], limit // _CLOSED_SHARE)
    num_closed = limit // _CLOSED_SHARE if closed_answers else 0
    opened = [
        Example(next_question(asked[False][answer]), answer)
        for answer in frequent(asked[False], limit - num_closed)
    ]
    closed = []
    for place in range(num_closed):
        answer = closed_answers[place % len(closed_answers)]
        closed.append(Example(next_question(asked[True][answer]), answer))
    return _spread(_apart(opened, records), closed)


def _apart(examples: Sequence[Example], records: Sequence[Record]) -> list[Example]:
    """Take one example of each question form in turn."""
    wanted = {example.question for example in examples}
    forms = {
        question: question if form is None else form
        for question, form in columns(records, "question", "form")
        if question in wanted
    }
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[str(forms[example.question])].append(example)
    turns = zip_longest(*groups.values())
    return [example for turn in turns for example in turn if example is not None]


def _spread(many: Sequence[Example], few: Sequence[Example]) -> list[Example]:
    """Put `few` at even distances among `many`."""
    total = len(many) + len(few)
    keyed = [((place + 0.5) * total / max(len(many), 1), item) for place, item in enumerate(many)]
    keyed += [((place + 0.5) * total / max(len(few), 1), item) for place, item in enumerate(few)]
    return [item for _, item in sorted(keyed, key=lambda pair: pair[0])]


def write_examples(
    config: PromptConfig, examples: Sequence[Example], *, spelt: Callable[[str], str | None]
) -> PromptConfig:
    """Return the prompt with the examples in the place of `{examples}`.

    Args:
        config: With a template that has such a place.
        examples: What to write there.
        spelt: From an answer to what stands for the image.
    """
    _, _, turn = config.template.partition(EXAMPLES)
    end = turn_end(config)
    text = "".join(
        turn.replace("{image}", spelt(answer) or "").replace("{question}", question) + answer + end
        for question, answer in examples
    )
    return config.model_copy(update={"template": config.template.replace(EXAMPLES, text)})
