"""Descriptions: what can be seen stays, what an atlas adds goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from clover.core.record import read_records
from clover.instruct.caption import clean
from clover.instruct.description import describe

TEXT = Path(__file__).parents[3] / "shared" / "data" / "text"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("CARDIOVASCULAR: HEART: Heart, old infarct", "Heart, old infarct."),
        ("HEPATOBILIARY: LIVER: BILIARY: Autoimmune hepatitis", "Liver: Autoimmune hepatitis."),
        ("Endocrine: Parathyroid, adenoma", "Parathyroid, adenoma."),
        ("BREAST: Fibroadenoma", "Breast: Fibroadenoma."),
        # What only looks like a heading is part of the sentence.
        (
            "The diagnosis: fibroadenoma of the breast.",
            "The diagnosis: fibroadenoma of the breast.",
        ),
        ("ORAL: Cyst", "Cyst."),
        ("SKIN: Nevus: Micro low mag H&E good example", "Skin: Nevus: H&E."),
        ("SKIN: Nevus: Micro H&E nests in dermis", "Skin: Nevus: H&E, nests in dermis."),
        ("Kidney, nodules in a patient with diabetes, PAS", "Kidney, nodules, PAS."),
        ("Heart, infarct, 6 days old", "Heart, infarct."),
        ("PROSTATE: nerve invasion typical carcinoma", "Prostate: Nerve invasion, carcinoma."),
        ("BONE: Bone with nice bone formation", "Bone with bone formation."),
        ("Ducts are seen. adenocarcinoma.", "Ducts are seen. Adenocarcinoma."),
        ("LUNG: typical carcinoid", "Lung: Typical carcinoid."),
        ("LUNG: typical granuloma source unknown", "Lung: Granuloma."),
        ("LYMPHATIC: Lymph node: atypical cells, see other slides", "Lymph node: atypical cells."),
        # A caption of nothing but headings is still a caption.
        ("LIVER: ORAL: \n", "Liver."),
    ],
)
def test_headings_remarks_and_histories_are_left_out(caption: str, expected: str) -> None:
    assert describe(caption) == expected


@pytest.mark.parametrize(
    "caption",
    [
        "So this is fat, PAS stain, and we see necrosis in the centre.",
        "This is a good example of a follicle. Typical are round crypts.",
        "A case of sarcoidosis is seen in the lung, and this lesion is typical.",
    ],
)
def test_prose_is_no_atlas_and_loses_nothing(caption: str) -> None:
    assert describe(caption) == clean(caption)


def test_of_a_history_only_the_history_goes() -> None:
    found = describe("Lung from a patient with AIDS shows Pneumocystis, H&E.")
    assert found == "Lung shows Pneumocystis, H&E."
    found = describe("Biopsy of a 45-year-old man shows carcinoma.")
    assert found == "Biopsy of a man shows carcinoma."


@pytest.mark.parametrize("name", ["captions_peir_histology.csv", "patchgastricadc22_captions.csv"])
def test_of_real_captions_no_word_is_added_and_none_is_left_without_a_description(
    name: str,
) -> None:
    if not (TEXT / name).exists():
        pytest.skip(f"no shared file {name}")
    for record in read_records(TEXT / name, needs="caption").records:
        caption = record.caption or ""
        found = describe(caption)
        assert any(character.isalpha() for character in found)
        words = {word.strip(".,:;()").lower() for word in found.split()}
        assert words <= {word.strip(".,:;()").lower() for word in clean(caption).split()}
