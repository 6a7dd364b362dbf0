"""The labelled set: hand-written pairs, and good ones broken by rule in each of the other ways.

The phrases that break a pair are partly outside the filter's word lists on purpose: a filter that
knows every phrase of its own test proves nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import yaml

from clover.core.record import Record

_LEAKS = (
    *("According to the caption, {}", "{} This is mentioned in the text.", "The title says: {}"),
    *("The narrator explains that {}", "{} as stated in the description.", "In this context, {}"),
    *("{} The speaker points it out.", "As the caption puts it, {}", "The provided text says {}"),
    *("As described in the report, {}", "The lecturer shows that {}", "From the figure legend: {}"),
)
_DATES = ("{} The sample is from March 2014.", "{} (12/05/2009)", "{} It was taken in 1998.")
_MAGNIFICATIONS = (
    *("{} This is seen at 400x.", "At high power, {}", "{} (magnification x20)", "At 40X, {}"),
    *("Under low magnification, {}", "{} The objective is 10x."),
)
_ADVICE = (
    *("{} The patient should receive chemotherapy.", "{} We recommend surgical resection."),
    *("{} Treatment with steroids helps.", "{} You should start antibiotics now."),
    *("{} Radiotherapy should follow.", "{} It needs surgery.", "{} An operation is mandatory."),
)
_CERTAIN = (
    *("This is definitely the diagnosis: {}", "{} The patient has cancer without a doubt."),
    *("{} The prognosis is poor.", "{} This proves that the disease is fatal."),
    *("{} The survival rate is low.", "{} There can be no other diagnosis."),
)
_CUTS = (" and the", ', "and', " with a", " of")


@dataclass(frozen=True)
class Labelled:
    """A pair, whether it is good, and in which way it is not."""

    record: Record
    is_good: bool
    kind: str
    part: str


def load(seed: int = 0) -> list[Labelled]:
    """Return the whole set, shuffled within images so that order tells nothing."""
    tree = yaml.safe_load(Path(__file__).with_name("labelled.yaml").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    found: list[Labelled] = []
    for part in ("tuned", "held_out"):
        items = tree[part]
        for number, item in enumerate(items):
            other = items[(number + 5) % len(items)]
            found.extend(_of_caption(f"{part}-{number}", item, other, rng))
    return found


def _of_caption(image: str, item: dict, other: dict, rng: random.Random) -> list[Labelled]:
    made: list[tuple[str, str, str]] = [("good", *pair) for pair in item["good"]]
    made += [tuple(row) for row in item["broken"]]
    opens = [p for p in item["good"] if not p[1].lower().startswith(("yes", "no"))]
    closed = [p for p in item["good"] if p[1].lower().strip(".") in ("yes", "no")]
    for kind, phrases in (
        *(("leakage", _LEAKS), ("date", _DATES), ("magnification", _MAGNIFICATIONS)),
        *(("advice", _ADVICE), ("overconfident", _CERTAIN)),
    ):
        question, answer = rng.choice(opens)
        made.append((kind, question, rng.choice(phrases).format(answer)))
    for question, answer in rng.sample(closed, min(2, len(closed))):
        flipped = "No" if answer.lower().startswith("yes") else "Yes"
        made.append(("polarity", question, flipped))
    question, answer = rng.choice(opens)
    made.append(("cut off", question, answer.rstrip(".") + rng.choice(_CUTS)))
    question, _ = rng.choice(opens)
    foreign = rng.choice([a for _, a in other["good"] if len(a.split()) > 4])
    made.append(("another caption", question, foreign))
    good = made[0]
    made.append(("duplicate", _reworded(good[1]), good[2]))
    made.append(("unparseable", f"question: {good[1]}", f'answer: "{good[2]}'))
    if rng.random() < 0.5:
        made.append(("length", "Why?", good[2]))
    return [
        Labelled(
            Record(
                id=f"{image}-{index}",
                image=f"{image}.png",
                caption=item["caption"],
                question=question,
                answer=answer,
                origin="generated",
            ),
            kind == "good",
            kind,
            image.rsplit("-", 1)[0],
        )
        for index, (kind, question, answer) in enumerate(made)
    ]


def _reworded(question: str) -> str:
    return question.replace(" in the image?", "?").replace("?", " here?")
