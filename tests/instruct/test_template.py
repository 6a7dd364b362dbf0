"""Template-based instructions: the caption answers, and silence is never a no."""

from __future__ import annotations

from collections import Counter

import pytest

from clover.core.record import Record
from clover.instruct.caption import (
    clean,
    has_date,
    has_magnification,
    is_english,
    plain_text,
    problem,
)
from clover.instruct.filter import filter_records
from clover.instruct.lists import load_yaml
from clover.instruct.template import write_template_instructions


def write(caption: str, **more: str) -> list[Record]:
    return write_template_instructions(
        [Record(id="c", image="c.png", caption=caption, **more)],  # type: ignore[arg-type]
        seed=0,
    )


def test_there_are_at_least_forty_templates_and_no_two_alike() -> None:
    templates = load_yaml("templates")
    texts = [*templates["concise"], *templates["detailed"]]
    assert len(texts) >= 40
    assert len({text.lower() for text in texts}) == len(texts)


def test_the_answer_is_the_cleaned_caption() -> None:
    first = write("LIVER: Cirrhosis: Micro low mag H&E (Fig. 3b) taken 12/03/1999")[0]
    assert first.answer == "Liver: Cirrhosis: H&E, taken."
    assert first.origin == "template"
    assert first.answer_type == "open"


def test_long_captions_are_asked_in_detail_and_short_ones_concisely() -> None:
    templates = load_yaml("templates")
    assert write("Liver.")[0].question in templates["concise"]
    assert write("Liver with fibrosis " * 12)[0].question in templates["detailed"]


def test_attributes_are_asked_only_where_stated() -> None:
    kinds = {r.model_extra["template"] for r in write("Some tissue.") if r.model_extra}
    assert kinds == {"concise"}
    answers = {r.answer for r in write("Liver, PAS stain, with necrosis and no fibrosis.")}
    assert {"Liver.", "Periodic acid-Schiff (PAS).", "Yes", "No"} <= answers


@pytest.mark.parametrize(
    ("caption", "finding"),
    [
        ("Liver: Primary biliary cirrhosis", "cirrhosis"),
        ("Pancreas: Cystic fibrosis", "fibrosis"),
    ],
)
def test_a_finding_in_the_name_of_a_disease_is_not_asked_for(caption: str, finding: str) -> None:
    assert not [r for r in write(caption) if finding in (r.question or "")]
    seen = [r.question or "" for r in write(f"{caption}, with {finding}.") if r.answer == "Yes"]
    assert any(finding in question for question in seen)


def test_two_organs_leave_the_question_for_the_organ_out() -> None:
    assert not [r for r in write("Liver metastasis of a colon tumor.") if r.answer == "Liver."]


def test_same_seed_same_questions_whatever_the_order() -> None:
    records = [Record(id=str(i), image=f"{i}.png", caption=f"Liver {i}, H&E.") for i in range(20)]
    forward = write_template_instructions(records, seed=1)
    backward = write_template_instructions(records[::-1], seed=1)
    assert {r.id: r for r in forward} == {r.id: r for r in backward}
    other = write_template_instructions(records, seed=2)
    assert [r.question for r in forward] != [r.question for r in other]


def test_closed_attribute_questions_are_about_evenly_yes_and_no() -> None:
    records = [Record(id=str(i), image=f"{i}.png", caption="Liver, H&E.") for i in range(300)]
    answers = Counter(
        r.answer for r in write_template_instructions(records, seed=0) if r.answer_type == "closed"
    )
    assert 0.4 < answers["Yes"] / answers.total() < 0.6


def test_source_licence_group_and_split_travel_along() -> None:
    found = write("Liver, H&E.", source="s", licence="CC0", group="patient-1", split="train")
    assert {(r.source, r.licence, r.group, r.split) for r in found} == {
        ("s", "CC0", "patient-1", "train")
    }
    assert {r.group for r in write("Liver, H&E.")} == {"c.png"}


def test_templates_pass_the_filter() -> None:
    captions = [
        "Kidney, PAS. Thickened basement membranes, no inflammation.",
        "Lung with caseating granulomas, acid-fast stain.",
        "Normal liver, H&E.",
        "Squamous cell carcinoma of the skin with keratin pearls, H&E.",
    ]
    records = [Record(id=str(i), image=f"{i}.png", caption=c) for i, c in enumerate(captions)]
    kept, rejected = filter_records(write_template_instructions(records, seed=0))
    assert kept
    assert not rejected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Liver <b>with</b> fat &amp; fibrosis", "Liver with fat & fibrosis."),
        ("Liver \U0001f600 with fat", "Liver with fat."),
        ("Liver\r\nwith fat", "Liver with fat."),
        ("BREAST: carcinoma", "Breast: carcinoma."),
        ("Liver, x400, original magnification", "Liver."),
        ("Liver (arrow) with fat [0.1, 0.2, 0.3, 0.4]", "Liver with fat."),
        ("see https://example.org/x liver", "See liver."),
    ],
)
def test_markup_emoji_line_ends_and_magnification_are_cleaned(caption: str, expected: str) -> None:
    assert clean(caption) == expected


@pytest.mark.parametrize(
    "text",
    [
        "A 2 x 3 cm mass in the liver.",
        "It measures 4 x 5 x 6 cm.",
        "A 4.5 × 3.25 x 2 cm nodule.",
        "A 2 cm x 3 cm nodule.",
        "A 2x3 mm polyp, a 2x 3 mm polyp and a 2 x3 mm polyp.",
        "Nuclei of 10 x 12 µm and spores of 2 x 4 microns.",
        "A grid of 8 x 8 fields.",
        "Approximately 2000 cells per field.",
        "One mitosis in 2000 cells.",
        "Counted from 1950 nuclei of the tumour.",
        "A weight of 1900 g.",
    ],
)
def test_sizes_are_no_magnifications_and_counts_no_years(text: str) -> None:
    assert clean(text) == text
    assert not has_magnification(text)
    assert not has_date(text)


@pytest.mark.parametrize(
    "text",
    [
        "Liver, x400.",
        "Liver, H&E, × 40.",
        "Liver at 400x.",
        "Liver, 10 x.",
        "Liver (original magnification x 200).",
        "A 2 x 3 cm mass, x100.",
        "Stage 2 x400.",
    ],
)
def test_a_magnification_is_known_beside_a_size(text: str) -> None:
    assert has_magnification(text)


@pytest.mark.parametrize(
    "text",
    [
        "Taken in 1998.",
        "Liver, biopsied in 2004 and stained later.",
        "Cases from 1990 to 2005.",
        "Seen since 2010, in March 2014, on 12/05/2009.",
        "On 4th July 1976.",
        "Fibrosis (2003).",
    ],
)
def test_years_are_known_by_a_month_or_the_word_before(text: str) -> None:
    assert has_date(text)
    assert not any(character.isdigit() for character in clean(text))


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "empty caption"),
        ("nan", "empty caption"),
        ("<p></p>", "empty caption"),
        ("12 345", "caption without a word"),
        ("x" * 9000, "caption longer than"),
        ("Die Leber zeigt eine Fibrose mit der Bildung von Knoten und ist nicht normal", "English"),
        ("El hígado muestra una fibrosis con los nódulos en la zona que se ve", "English"),
        ("肝脏显示脂肪变性和纤维化", "English"),
        ("Печень с жировой дистрофией", "English"),
    ],
)
def test_what_cannot_be_asked_about_has_a_reason(caption: str, reason: str) -> None:
    assert reason in (problem(caption) or "")


def test_terse_english_and_latin_names_count_as_english() -> None:
    for caption in ("BREAST: Fibroadenoma", "Aspergillus fumigatus", "TGF-β in the stroma"):
        assert is_english(plain_text(caption))
