"""What a clause states, denies and leaves open, as pathologists write it."""

from __future__ import annotations

import pytest

from clover.core.record import Record
from clover.instruct.filter import filter_records
from clover.instruct.template import write_template_instructions
from clover.instruct.vocabulary import dictionary

YES, NO, OPEN = "stated", "denied", "open"

FINDINGS = [
    # Plain.
    ("Coagulative necrosis is seen in the centre.", "necrosis", YES),
    ("There is no necrosis.", "necrosis", NO),
    ("Necrosis is absent.", "necrosis", NO),
    ("The tumour grows without necrosis.", "necrosis", NO),
    ("Necrosis was not identified.", "necrosis", NO),
    ("Necrosis could not be identified.", "necrosis", NO),
    ("Necrosis can not be demonstrated in these levels.", "necrosis", NO),
    ("Necrosis couldn't be found.", "necrosis", NO),
    ("Necrosis has not been observed.", "necrosis", NO),
    ("We cannot see necrosis.", "necrosis", NO),
    ("Negative for dysplasia.", "dysplasia", NO),
    ("Negative for: dysplasia.", "dysplasia", NO),
    ("The sections failed to show granulomas.", "granuloma", NO),
    ("Deeper levels do not show granulomas.", "granuloma", NO),
    ("The levels, not showing granulomas, were repeated.", "granuloma", NO),
    ("A fibrous capsule without evidence of invasion.", "invasion", NO),
    ("Vasculitis has been ruled out.", "vasculitis", NO),
    ("The intact wall rules out vasculitis.", "vasculitis", NO),
    ("Note the absence of fibrosis.", "fibrosis", NO),
    ("The margin is free of dysplasia.", "dysplasia", NO),
    ("The stroma lacks desmoplasia.", "desmoplasia", NO),
    ("The nodule is devoid of calcification.", "calcification", NO),
    ("Granulomas are no longer seen.", "granuloma", NO),
    ("Lymphovascular invasion: not identified.", "lymphovascular invasion", NO),
    ("Perineural invasion: absent", "perineural invasion", NO),
    ("Necrosis: present", "necrosis", YES),
    ("Necrosis (none), margins clear.", "necrosis", NO),
    ("Mitoses: 0/10 HPF.", "mitoses", NO),
    ("Fungi were looked for but not found.", "fungal organisms", NO),
    ("A necrosis-free nodule.", "necrosis", NO),
    ("Neither granulomas nor vasculitis was found.", "vasculitis", NO),
    # One instead of another.
    ("Hemorrhage rather than necrosis.", "necrosis", NO),
    ("Hemorrhage rather than necrosis.", "haemorrhage", YES),
    ("Fat necrosis instead of abscess.", "abscess", NO),
    ("Fat necrosis instead of abscess.", "necrosis", YES),
    ("Not fibrosis but amyloid widens the septa.", "amyloid", YES),
    ("Not fibrosis but amyloid widens the septa.", "fibrosis", NO),
    # A negation in form alone.
    ("No doubt there is necrosis.", "necrosis", YES),
    ("Necrosis is seen without doubt.", "necrosis", YES),
    ("Not only necrosis but also haemorrhage.", "necrosis", YES),
    ("Not only necrosis but also haemorrhage.", "haemorrhage", YES),
    ("Not just fibrosis: the lobules are lost.", "fibrosis", YES),
    ("Mitoses are not uncommon.", "mitoses", YES),
    ("The tumour is not without necrosis.", "necrosis", YES),
    ("A cyst no longer than 2 cm.", "cyst", YES),
    # Nothing is said.
    ("Cannot exclude necrosis.", "necrosis", OPEN),
    ("We can't rule out invasion.", "invasion", OPEN),
    ("Invasion cannot be excluded.", "invasion", OPEN),
    ("Early invasion could not be entirely ruled out.", "invasion", OPEN),
    ("Possible necrosis in one corner.", "necrosis", OPEN),
    ("Focus suspicious for lymphovascular invasion.", "lymphovascular invasion", OPEN),
    ("Deeper levels to rule out metastasis.", "metastasis", OPEN),
    ("Necrosis versus fibrin.", "necrosis", OPEN),
    ("Dysplasia vs. regeneration of the crypts.", "dysplasia", OPEN),
    ("Dysplasia vs. regeneration of the crypts.", "regeneration", OPEN),
    ("?necrosis at the edge.", "necrosis", OPEN),
    ("Necrosis?", "necrosis", OPEN),
    ("Abscess (?) in the wall.", "abscess", OPEN),
    ("This may represent metastasis.", "metastasis", OPEN),
    ("It is unclear whether vasculitis is present.", "vasculitis", OPEN),
    ("Amyloid is suspected.", "amyloid", OPEN),
    ("Granuloma-like clusters of cells.", "granuloma", OPEN),
    ("A regenerating nodule that mimics dysplasia.", "dysplasia", OPEN),
    ("No definite invasion.", "invasion", OPEN),
    ("Mitoses are not increased.", "mitoses", OPEN),
    ("No necrosis apart from a small focus.", "necrosis", OPEN),
    ("Possible absence of necrosis.", "necrosis", OPEN),
    ("Granulomas with and without necrosis.", "necrosis", OPEN),
    ("Little or no inflammation.", "inflammation", OPEN),
    ("Granulomas are not a feature.", "granuloma", OPEN),
    # Two findings, one of them denied.
    ("No atypia, but necrosis is seen.", "nuclear atypia", NO),
    ("No atypia, but necrosis is seen.", "necrosis", YES),
    ("Necrosis is present, mitoses are absent.", "necrosis", YES),
    ("Necrosis is present, mitoses are absent.", "mitoses", NO),
    ("Necrosis is present and fibrosis is not seen.", "necrosis", YES),
    ("No necrosis is seen, and fibrosis is marked.", "fibrosis", YES),
    ("Haemorrhage, but not necrosis, is seen.", "haemorrhage", YES),
    ("Haemorrhage, but not necrosis, is seen.", "necrosis", NO),
    ("Fibrosis without inflammation.", "fibrosis", YES),
    ("Fibrosis without inflammation.", "inflammation", NO),
    ("No granulomas, with marked fibrosis.", "fibrosis", YES),
    ("Marked fibrosis (no granulomas) and oedema.", "edema", YES),
    ("Necrosis is not seen; mitoses are frequent.", "mitoses", YES),
    ("Possible fibrosis, no necrosis.", "necrosis", NO),
    ("Possible fibrosis, no necrosis.", "fibrosis", OPEN),
    ("Ulceration is seen; dysplasia cannot be excluded.", "ulceration", YES),
    ("Prominent nucleoli, and granulomas are absent.", "prominent nucleoli", YES),
    ("The glands with dysplasia are not inflamed.", "dysplasia", YES),
    # How far a negation reaches is not certain.
    ("No granulomas with necrosis.", "necrosis", OPEN),
    ("No mitoses in the spindle cells.", "spindle cells", OPEN),
    ("No mitoses in the spindle cells.", "mitoses", NO),
    ("No necrosis, marked fibrosis.", "fibrosis", OPEN),
    ("No necrosis and marked fibrosis.", "fibrosis", OPEN),
    # Lists.
    ("No necrosis, mitoses or atypia.", "necrosis", NO),
    ("No necrosis, mitoses or atypia.", "mitoses", NO),
    ("No necrosis, mitoses or atypia.", "nuclear atypia", NO),
    ("Without haemorrhage or necrosis.", "haemorrhage", NO),
    ("Necrosis, mitoses and atypia are absent.", "necrosis", NO),
    ("Necrosis, mitoses, and atypia are absent.", "mitoses", NO),
    ("Necrosis, mitoses or atypia not seen.", "mitoses", NO),
    (
        "There is no evidence of significant lymphocytic infiltration of the portal tracts, "
        "cholestasis of any degree, or centrilobular necrosis.",
        "necrosis",
        OPEN,
    ),
    (
        "No convoluted or otherwise unusual nuclei, irregular chromatin, large blue bodies or "
        "viral inclusions.",
        "viral inclusions",
        NO,
    ),
    ("Features of malignancy (e.g. necrosis) are lacking.", "necrosis", OPEN),
]

STAINS = [
    ("PAS was not performed.", "periodic acid-Schiff (PAS)", NO),
    ("PAS could not be done.", "periodic acid-Schiff (PAS)", NO),
    ("Not stained with Giemsa.", "Giemsa", NO),
    ("The section was not stained with Giemsa.", "Giemsa", NO),
    ("The section was stained with Giemsa.", "Giemsa", YES),
    ("H&E rather than PAS.", "periodic acid-Schiff (PAS)", NO),
    ("H&E, not PAS.", "hematoxylin and eosin (H&E)", YES),
    ("Probably Giemsa.", "Giemsa", OPEN),
    ("PAS shows no fungi.", "periodic acid-Schiff (PAS)", YES),
    ("Fungi are not seen, PAS.", "periodic acid-Schiff (PAS)", YES),
]


def standing_of(name: str, clause: str, term: str) -> str:
    found = [how for how, terms in dictionary(name).standings(clause).items() if term in terms]
    assert len(found) == 1, f"{clause} names no {term}"
    return found[0]


@pytest.mark.parametrize(("clause", "finding", "right"), FINDINGS)
def test_a_finding_is_stated_denied_or_left_open(clause: str, finding: str, right: str) -> None:
    assert standing_of("findings", clause, finding) == right


@pytest.mark.parametrize(("clause", "stain", "right"), STAINS)
def test_a_stain_is_stated_denied_or_left_open(clause: str, stain: str, right: str) -> None:
    assert standing_of("stains", clause, stain) == right


@pytest.mark.parametrize(("clause", "finding", "right"), FINDINGS)
def test_the_filter_lets_no_other_yes_or_no_pass(clause: str, finding: str, right: str) -> None:
    kept, _ = filter_records(
        Record(
            id=answer,
            image="a.png",
            caption=clause,
            question=f"Is there {finding}?",
            answer=answer,
            origin="generated",
        )
        for answer in ("Yes", "No")
    )
    assert {r.id for r in kept} == {YES: {"Yes"}, NO: {"No"}, OPEN: set()}[right]


@pytest.mark.parametrize(("clause", "finding", "right"), FINDINGS)
def test_templates_ask_nothing_else(clause: str, finding: str, right: str) -> None:
    made = write_template_instructions([Record(id="c", image="c.png", caption=clause)], seed=0)
    told = {r.answer for r in made if r.answer_type == "closed" and finding in (r.question or "")}
    assert told <= {YES: {"Yes"}, NO: {"No"}, OPEN: set()}[right]
    assert right != NO or told == {"No"}


def test_an_open_answer_may_not_decide_what_the_caption_leaves_open() -> None:
    def kept(answer: str) -> bool:
        record = Record(
            id="a",
            image="a.png",
            caption="Liver with fatty change; necrosis of hepatocytes cannot be excluded.",
            question="What is seen in the liver?",
            answer=answer,
            origin="generated",
        )
        return bool(filter_records([record])[0])

    assert kept("Fatty change; necrosis of hepatocytes cannot be excluded.")
    assert not kept("Fatty change and necrosis of hepatocytes.")
    assert not kept("Fatty change and no necrosis of hepatocytes.")
