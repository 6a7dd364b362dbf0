"""The filter: measured on the labelled set, and each rule by itself."""

from __future__ import annotations

import pytest

from clover.core.record import Record
from clover.instruct.duplicates import NearDuplicates
from clover.instruct.filter import filter_records, rule_counts
from clover.instruct.mismatch import mismatch
from clover.instruct.standing import is_denied
from clover.instruct.vocabulary import dictionary

from . import labelled


def pair(question: str, answer: str, caption: str | None = None, **more: str) -> Record:
    fields = {"id": "a", "image": "a.png", "origin": "generated", **more}
    return Record(question=question, answer=answer, caption=caption, **fields)  # type: ignore[arg-type]


def reason(question: str, answer: str, caption: str | None = None) -> str | None:
    _, rejected = filter_records([pair(question, answer, caption)])
    return rejected[0].reason if rejected else None


def test_precision_and_recall_on_the_labelled_set() -> None:
    items = labelled.load()
    assert len(items) >= 300
    kept = {r.id for r in filter_records([item.record for item in items])[0]}
    for part in ("tuned", "held_out", "all"):
        chosen = [item for item in items if part in (item.part, "all")]
        good = sum(item.is_good for item in chosen)
        held = [item for item in chosen if item.record.id in kept]
        right = sum(item.is_good for item in held)
        precision, recall = right / len(held), right / good
        print(
            f"{part}: {len(chosen)} pairs, {good} good; precision {precision:.3f}, "
            f"recall {recall:.3f}"
        )
        assert precision >= 0.95
        assert recall >= 0.90


def test_every_kind_of_broken_pair_is_mostly_caught() -> None:
    items = labelled.load()
    kept = {r.id for r in filter_records([item.record for item in items])[0]}
    kinds = {item.kind for item in items if not item.is_good}
    assert len(kinds) >= 14
    for kind in kinds:
        broken = [item for item in items if item.kind == kind]
        slipped = sum(item.record.id in kept for item in broken)
        assert slipped <= 0.15 * len(broken), kind


@pytest.mark.parametrize(
    ("question", "answer", "caption", "rule"),
    [
        ("Is there necrosis?", "Yes", "Liver without necrosis.", "contradiction"),
        ("Is there necrosis?", "No", "Liver with necrosis.", "contradiction"),
        ("Is there necrosis?", "No", "Liver.", "unsupported"),
        (
            "What is seen in the pancreas?",
            "A lesion is seen.",
            "Pancreas: normal.",
            "contradiction",
        ),
        ("What is seen in the liver?", "Fibrosis in 40%.", "Liver: fibrosis in 20%.", "number"),
        ("What does the title say about it?", "Liver.", "Liver.", "leakage"),
        ("Which organ is this?", "Liver, in May 2012.", "Liver.", "date"),
        ("Which organ is this?", "Liver at 400x.", "Liver.", "magnification"),
        ("Which organ is this?", "", "Liver.", "unparseable"),
        ("Organ?", "Liver.", "Liver.", "length"),
        ("Which organ is this?", "The patient should undergo surgery.", "Liver.", "advice"),
        ("What is the most common cause?", "Liver fat.", "Liver fat.", "general"),
        ("What is seen here?", "Fat " * 9, "Liver fat.", "repetition"),
        ("What is the nature of the fat?", "The nature of the fat.", "Liver fat.", "echo"),
        ("How do the nuclei look?", "Bone marrow.", "Bone marrow.", "mismatch"),
        ("Which tissue is shown?", "Tuberculosis.", "Lung: tuberculosis.", "mismatch"),
        ("Which cells are shown?", "The image shows lung.", "Lung cells.", "mismatch"),
        ("What is the name of the cell?", "HEMATOLOGIC: Bone marrow", "Bone marrow.", "mismatch"),
        ("What is the size of it?", "It fills the stroma.", "It fills the stroma.", "mismatch"),
        ("What is the type of tumor?", "Irregular ducts.", "Irregular ducts.", "mismatch"),
        ("What is the primary lesion?", "Urinary.", "Urinary: kidney.", "mismatch"),
        ("What is the name of the patient?", "Fibrosis.", "Fibrosis.", "mismatch"),
        ("What is (seen in the image?", "Fibrosis.", "Fibrosis.", "unparseable"),
        ("What in the image is in the image?", "Fibrosis.", "Fibrosis.", "unparseable"),
        ("What is the origin of the tumor?", "It is not known.", "A tumor.", "nonanswer"),
        ("Which organ is this?", "It is undoubtedly liver.", "Liver.", "overconfident"),
    ],
)
def test_each_rule_names_itself(question: str, answer: str, caption: str, rule: str) -> None:
    found = reason(question, answer, caption)
    assert found is not None
    assert found.split(":")[0] == rule


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Which tissue is shown?", "Lung with tuberculosis."),
        ("Which tissue is shown?", "Tumor tissue."),
        ("Which cells are shown?", "Alveolar macrophages of the lung."),
        ("Which cells fill the lung?", "Macrophages."),
        ("How large are the cells of the lung?", "They are of medium size."),
        ("Which tumor is shown?", "A benign lesion of the lung."),
        ("What type of tumor is shown?", "A fibroadenoma."),
        ("Which organ is shown?", "Lung."),
    ],
)
def test_an_answer_of_the_kind_that_is_asked_for_stays(question: str, answer: str) -> None:
    assert mismatch(question, answer) is None


def test_a_diagnosis_named_three_times_is_no_running_in_circles() -> None:
    caption = (
        "Large irregular ducts invade. Well to moderately differentiated tubular adenocarcinoma "
        "(well differentiated tubular adenocarcinoma, moderately differentiated tubular "
        "adenocarcinoma) of the stomach, with scattered atypical cells between the glands."
    )
    assert reason("Describe this image in detail.", caption, caption) is None


def test_mitotic_figures_are_no_leak_and_a_look_in_the_mirror_is_no_magnification() -> None:
    caption = "Squamous cell carcinoma with many mitotic figures and highly atypical cells."
    assert reason("What is seen?", "Mitotic figures and highly atypical cells.", caption) is None


def test_a_size_must_be_told_in_full() -> None:
    caption = "Liver with a mass that measures 4 x 5 x 6 cm."
    assert (
        reason("How large is the mass of the liver?", "It measures 4 x 5 x 6 cm.", caption) is None
    )
    assert "number" in str(reason("How large is the liver mass?", "It measures 6 cm.", caption))
    side = "The mass of the liver is up to 6 cm large."
    assert reason("How large is the liver mass?", side, caption) is None


def test_no_is_supported_when_the_caption_states_another_organ_or_stain() -> None:
    assert reason("Is this tissue from the liver?", "No", "Kidney, PAS.") is None
    assert reason("Is the stain Congo red?", "No", "Kidney, PAS.") is None


def test_same_pair_is_a_duplicate_for_one_image_and_none_for_two() -> None:
    one = [pair("Is necrosis present?", "Yes", "Necrosis.", id=str(i)) for i in range(3)]
    two = [
        pair("Is necrosis present?", "Yes", "Necrosis.", id=str(i), image=f"{i}.png")
        for i in range(3)
    ]
    assert rule_counts(filter_records(one)[1]) == {"duplicate": 2}
    assert not filter_records(two)[1]


def test_question_in_other_words_is_a_near_duplicate() -> None:
    caption = "Necrosis and fibrosis of the liver."
    records = [
        pair("Is there necrosis in the image?", "Yes", caption, id="1"),
        pair("Can necrosis be seen here?", "Yes", caption, id="2"),
        pair("Is there fibrosis in the image?", "Yes", caption, id="3"),
    ]
    kept, rejected = filter_records(records)
    assert [r.id for r in kept] == ["1", "3"]
    assert rejected[0].reason.startswith("duplicate")


def test_rejection_holds_the_whole_record_so_that_it_can_be_taken_back() -> None:
    record = pair("Is there necrosis?", "No", "Liver with necrosis.", licence="CC0")
    _, rejected = filter_records([record])
    assert Record.model_validate(rejected[0].content) == record


def test_a_review_by_hand_overrules_the_rules_both_ways() -> None:
    records = [
        pair("Is there necrosis?", "No", "Liver with necrosis.", id="bad"),
        pair("Is there necrosis?", "Yes", "Liver with necrosis.", id="good"),
    ]
    kept, rejected = filter_records(records, reviewed={"bad": "keep", "good": "reject"})
    assert [r.id for r in kept] == ["bad"]
    assert rejected[0].reason.startswith("review")


def test_known_truth_is_not_measured_against_the_caption() -> None:
    record = pair("Is there necrosis?", "No", "Liver.", origin="truth")
    assert filter_records([record])[0] == [record]


def test_captions_may_come_by_image() -> None:
    record = pair("Is there necrosis?", "Yes")
    assert filter_records([record])[0] == [record]
    assert not filter_records([record], captions={"a.png": "No necrosis is seen."})[0]


def test_words_given_as_support_must_stand_in_the_caption() -> None:
    record = pair("Is there necrosis?", "Yes", "Liver with necrosis.", support="extensive necrosis")
    assert filter_records([record])[1][0].reason.startswith("span")


@pytest.mark.parametrize(
    ("text", "word", "denied"),
    [
        ("There is no necrosis.", "necrosis", True),
        ("Without necrosis or fibrosis.", "fibrosis", True),
        ("Necrosis is absent.", "Necrosis", True),
        ("No atypia, but necrosis is seen.", "necrosis", False),
        ("Fibrosis is not seen. Necrosis is.", "Necrosis", False),
        ("Prominent nucleoli, and follicles are absent.", "nucleoli", False),
    ],
)
def test_a_negation_reaches_to_the_end_of_its_clause(text: str, word: str, denied: bool) -> None:
    start = text.index(word)
    assert is_denied(text, start, start + len(word)) is denied


def test_longest_term_wins_and_plurals_are_known() -> None:
    assert dictionary("body_parts").stated("Bone marrow biopsy") == ["bone marrow"]
    assert dictionary("body_parts").stated("Two lymph nodes") == ["lymph node"]
    assert dictionary("findings").stated("Granulomas and cysts") == ["granuloma", "cyst"]
    assert dictionary("stains").stated("The pasty cells") == []


def test_minhash_agrees_with_exact_similarity() -> None:
    import random

    rng = random.Random(0)
    words = [f"w{i}" for i in range(40)]
    known, kept = NearDuplicates(0.8), []
    wrong = 0
    for _ in range(300):
        found = frozenset(rng.sample(words, rng.randint(5, 9)))
        if kept and rng.random() < 0.4:
            found = kept[rng.randrange(len(kept))] | {rng.choice(words)}
        exact = any(len(found & other) / len(found | other) >= 0.8 for other in kept)
        says = known.find_or_add(found)
        wrong += says != exact
        assert exact or not says, "a duplicate must be one"
        if not says:
            kept.append(found)
    assert wrong <= 6
