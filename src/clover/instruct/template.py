"""Template-based instructions: a question from a list, answered by the caption itself.

In: records with captions. Out: for each caption one "describe" question whose answer is the
cleaned caption, and attribute questions (organ, stain, finding) where the caption states the
attribute. What a caption does not say, or leaves open, is never asked: silence is no "no".
"""

from __future__ import annotations

import random
from typing import Any

from clover.core.record import AnswerType, Record
from clover.instruct.caption import clean
from clover.instruct.description import describe
from clover.instruct.lists import load_yaml
from clover.instruct.vocabulary import dictionary

CONCISE_WORDS = 20
"""A cleaned caption of at most so many words is asked for concisely, a longer one in detail."""

# Stains and organs for the "no" side: common ones, so that the question is no giveaway.
_OTHER_BODY_PARTS = (
    *("liver", "kidney", "lung", "skin", "colon", "stomach", "breast", "prostate", "brain"),
    *("lymph node", "thyroid gland", "heart", "pancreas", "spleen", "ovary", "bone"),
)
_OTHER_STAINS = (
    *("hematoxylin and eosin (H&E)", "periodic acid-Schiff (PAS)", "Masson's trichrome"),
    *("Congo red", "Giemsa", "immunohistochemistry"),
)
# An organ whose name a caption of the other may rightly bear.
_OVERLAPPING = (
    {"bone", "bone marrow"},
    {"uterus", "endometrium", "cervix"},
    {"colon", "rectum"},
    {"abdomen", "peritoneum"},
    {"brain", "meninges"},
    {"lung", "pleura"},
    {"lymph node", "lymphoid tissue"},
    {"liver", "bile duct"},
)


def write_template_instructions(records: list[Record], *, seed: int) -> list[Record]:
    """Write template-based instructions for captioned records.

    Args:
        records: Records with captions; one without a caption, or whose caption holds nothing but a
            date or a magnification, brings none.
        seed: Chooses among the wordings; the same seed gives the same questions whatever the
            order of the records.

    Returns:
        One or more records a caption, `origin` "template".
    """
    instructions = []
    for record in records:
        rng = random.Random(f"{seed}:{record.id}:{record.caption}")
        instructions.extend(_of_caption(record, rng))
    return instructions


def _of_caption(record: Record, rng: random.Random) -> list[Record]:
    caption = clean(record.caption or "")
    if not any(character.isalpha() for character in caption):
        return []
    answer = describe(record.caption or "")
    templates = load_yaml("templates")
    style = "concise" if len(answer.split()) <= CONCISE_WORDS else "detailed"
    found: list[tuple[str, str, str, AnswerType]] = [
        (style, rng.choice(templates[style]), answer, "open")
    ]
    found += _attribute("body_part", "body_parts", _OTHER_BODY_PARTS, caption, rng)
    found += _attribute("stain", "stains", _OTHER_STAINS, caption, rng)
    found += _findings(caption, rng)
    return [
        _instruction(record, number, kind=kind, pair=(question, text, answer_type))
        for number, (kind, question, text, answer_type) in enumerate(found, start=1)
    ]


def _attribute(
    kind: str, source: str, others: tuple[str, ...], caption: str, rng: random.Random
) -> list[tuple[str, str, str, AnswerType]]:
    """Ask openly and closed about an attribute of which the caption states exactly one value."""
    found_in = dictionary(source).standings(caption)
    stated = found_in["stated"]
    if len(stated) != 1 or found_in["denied"] or found_in["open"]:
        return []
    value, templates = stated[0], load_yaml("templates")[kind]
    spoken = value[0].upper() + value[1:] + "."
    found: list[tuple[str, str, str, AnswerType]] = [
        (kind, rng.choice(templates["open"]), spoken, "open")
    ]
    # Half of the closed questions are about another value, which the stated one excludes.
    is_true = rng.random() < 0.5
    overlapping = {name for group in _OVERLAPPING if value in group for name in group}
    other = rng.choice([name for name in others if name != value and name not in overlapping])
    question = rng.choice(templates["closed"]).format(value=value if is_true else other)
    found.append((kind, question, "Yes" if is_true else "No", "closed"))
    return found


def _findings(caption: str, rng: random.Random) -> list[tuple[str, str, str, AnswerType]]:
    """Ask about one finding that the caption affirms, and about each that it denies."""
    findings, wording = dictionary("findings"), load_yaml("templates")["finding"]["closed"]
    found_in = findings.standings(caption)
    stated, denied = found_in["stated"], found_in["denied"]
    asked = [(value, "Yes") for value in rng.sample(stated, min(1, len(stated)))]
    asked += [(value, "No") for value in denied]
    found: list[tuple[str, str, str, AnswerType]] = []
    for value, answer in asked:
        found.append(("finding", _agree(rng.choice(wording), value), answer, "closed"))
    return found


def _agree(question: str, value: str) -> str:
    """Fill in a finding with the article and the verb that its number asks for."""
    countable = value.endswith(("cyst", "abscess", "granuloma", "thrombus", "foreign body"))
    plural = not countable and value.endswith("s") and not value.endswith(("sis", "tis", "us"))
    plural = plural or value in {"mitoses"}
    if plural:
        question = question.replace("Is there {value}", "Are there {value}")
        question = question.replace("Is {value}", "Are {value}")
    if countable:
        value = ("an " if value[0] in "aeiou" else "a ") + value
    return question.format(value=value)


def _instruction(
    record: Record, number: int, *, kind: str, pair: tuple[str, str, AnswerType]
) -> Record:
    question, answer, answer_type = pair
    update: dict[str, Any] = {
        "id": f"{record.id}-t{number}",
        "question": question,
        "answer": answer,
        "answer_type": answer_type,
        "group": record.group or record.image or record.id,
        "origin": "template",
        "prompt": load_yaml("templates")["version"],
        "template": kind,
    }
    return record.model_copy(update=update)
