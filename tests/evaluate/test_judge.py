"""The fast rules against a judge written word by word from METRICS, on texts nobody chose."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clover.evaluate.protocol import PROTOCOLS
from clover.evaluate.score import score_file
from reference.naive_judge import judge

NAMES = list(PROTOCOLS)
TEXT = (
    "yes no not Yes. NO! none nothing normal nodule yesterday know a an the The A one ten zero "
    "dont don't hed've somebody'd ow's'at Id've fat fat fat cells liver liver, "
    "well-differentiated - ( ) [x] 10,000 3.5 .5 5. e.g. H&E Sjögren Sjo\u0308gren μm ≥50% "
    "“quoted” ‘it’ — … 肝臓 no\u0301 NÓ İ ß ﬁbrosis \u00a0 \u2003 \u200b \ufeff \n \t "
    ", ; ? ! / \\ _ < > @ ` { } = + \" ' . : * # & % ~ "
    "½ ② ٣,٤ 1,2 \x1c \x85 \U0001f9eb yes,no no/yes n.o. y-e-s a.a.a"
)
PIECES = TEXT.split(" ")
FEW = st.lists(st.sampled_from(PIECES), max_size=12)
JOINED = st.tuples(FEW, st.sampled_from([" ", "", "  ", ". ", ", ", "-", "\n"])).map(
    lambda pair: pair[1].join(pair[0])
)
ODD = st.one_of(JOINED, st.text(max_size=40), st.text("yesno ant.,-'0129", max_size=30))
ITEMS = st.fixed_dictionaries(
    {
        "answer": st.one_of(ODD, st.sampled_from(["yes", "no", "Yes", "No."])),
        "prediction": ODD,
        "answer_type": st.sampled_from(["open", "closed"]),
        "yes_no_answer": st.sampled_from([None, "yes", "No", ""]),
    }
)


def written(items: list[dict[str, Any]], folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Score items as a user's file, and return what --per-item writes."""
    path, out = folder / "predictions.jsonl", folder / "items.jsonl"
    rows = [{"id": at, "question": "Q?", **item} for at, item in enumerate(items)]
    path.write_text("\n".join(json.dumps(line) for line in rows), encoding="utf-8")
    score_file(path, NAMES, per_item=out, draws=0)
    found = [json.loads(line) for line in out.read_text("utf-8").split("\n") if line]
    return {(line["id"], line["protocol"]): line for line in found}


def check(items: list[dict[str, Any]], folder: Path) -> None:
    found = written(items, folder)
    assert len(found) == len(items) * len(NAMES)
    for at, item in enumerate(items):
        for name in NAMES:
            line = found[at, name]
            for key, expected in judge(item, name).items():
                if key.startswith("bleu"):
                    assert line[key] == pytest.approx(expected, rel=1e-9, abs=0), (item, name, key)
                else:
                    assert line[key] == expected, (item, name, key)


@settings(max_examples=60, deadline=None)
@given(items=st.lists(ITEMS, min_size=1, max_size=12))
def test_every_rule_is_the_one_that_the_text_describes(
    items: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(items, tmp_path_factory.mktemp("judge"))


def test_answers_that_share_most_of_their_words(tmp_path: Path) -> None:
    rng = random.Random(6)
    items = []
    for number in range(600):
        gold = rng.choices(PIECES, k=rng.randint(0, 12))
        said = [rng.choice(PIECES) if rng.random() < 0.2 else word for word in gold]
        said += rng.choices(gold or ["no"], k=rng.randint(0, 4))
        items.append(
            {
                "answer": " ".join(gold) if number % 2 else rng.choice(["yes", "no"]),
                "prediction": rng.choice([" ", "-", ". "]).join(said),
                "answer_type": "open" if number % 2 else "closed",
                "yes_no_answer": None,
            }
        )
    check(items, tmp_path)


def test_very_long_answers(tmp_path: Path) -> None:
    long = "a.b. no well-differentiated liver dont 10,000 " * 60
    items = [
        {"answer": answer, "prediction": said, "answer_type": kind, "yes_no_answer": None}
        for answer, said in (("liver", long), (long, "liver"), (long, long + "."), ("", long))
        for kind in ("open", "closed")
    ]
    check(items, tmp_path)
