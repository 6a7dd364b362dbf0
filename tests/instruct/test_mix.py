"""The hybrid set: shares, balance, caps, and no image on both sides."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from clover.core.errors import CloverError
from clover.core.record import Record
from clover.instruct.mix import (
    MixSettings,
    balance_answers,
    body_part,
    data_card,
    first_names,
    mix_records,
)


def records(
    name: str, count: int, *, answer: str = "text", images: int | None = None
) -> list[Record]:
    return [
        Record(
            id=f"{name}{i}",
            image=f"{i % (images or count)}.png",
            question=f"Question {i}?",
            answer=answer,
            origin=name,
        )
        for i in range(count)
    ]


def test_shares_hold_and_no_record_is_used_twice() -> None:
    sources = {"a": records("a", 1000), "b": records("b", 100)}
    mixed = mix_records(sources, shares={"a": 3, "b": 1}, seed=0)
    assert Counter(r.origin for r in mixed) == {"a": 300, "b": 100}
    assert len({r.id for r in mixed}) == len(mixed)


def test_without_shares_everything_is_taken() -> None:
    assert len(mix_records({"a": records("a", 7), "b": records("b", 5)}, shares=None, seed=0)) == 12


def test_yes_and_no_end_up_equally_many() -> None:
    sources = {"a": records("y", 90, answer="Yes.") + records("n", 30, answer="no")}
    counts = Counter((r.answer or "").lower().strip(".") for r in mix_records(sources, seed=0))
    assert counts == {"yes": 30, "no": 30}
    unbalanced = mix_records(sources, seed=0, settings=MixSettings(balance=False))
    assert len(unbalanced) == 120


def test_prose_is_untouched_by_the_balance() -> None:
    assert len(balance_answers(records("a", 5) + records("y", 5, answer="Yes"))) == 5


def test_no_image_is_asked_about_more_often_than_the_cap() -> None:
    sources = {"a": records("a", 100, images=5), "b": records("b", 100, images=5)}
    mixed = mix_records(sources, seed=0, settings=MixSettings(per_image=3))
    assert Counter(r.image for r in mixed) == {f"{i}.png": 3 for i in range(5)}


def test_no_body_part_exceeds_its_share() -> None:
    liver = [Record(id=f"l{i}", image=f"l{i}", question="q", answer="Liver.") for i in range(80)]
    lung = [Record(id=f"p{i}", image=f"p{i}", question="q", answer="Lung.") for i in range(30)]
    skin = [Record(id=f"s{i}", image=f"s{i}", question="q", answer="Skin.") for i in range(30)]
    mixed = mix_records({"a": liver + lung + skin}, seed=0, settings=MixSettings(per_body_part=0.4))
    counts = Counter(body_part(r) for r in mixed)
    assert max(counts.values()) <= 0.4 * len(mixed)
    assert counts["lung"] == 30


def test_groups_are_never_split_and_more_data_moves_none() -> None:
    def sides(count: int) -> dict[str, str]:
        rows = [
            r.model_copy(update={"group": f"g{i % (count // 5)}"})
            for i, r in enumerate(records("a", count))
        ]
        mixed = mix_records({"a": rows}, seed=0, settings=MixSettings(validation_share=0.2))
        found: dict[str, set[str]] = {}
        for record in mixed:
            found.setdefault(str(record.group), set()).add(str(record.split))
        assert all(len(split) == 1 for split in found.values())
        return {group: split.pop() for group, split in found.items()}

    few, many = sides(500), sides(1000)
    assert 0.1 < Counter(few.values())["val"] / len(few) < 0.3
    assert all(many[group] == split for group, split in few.items())


def test_an_image_is_on_one_side_though_one_source_has_groups_and_another_none() -> None:
    grouped = [
        r.model_copy(update={"group": f"patient{i // 4}"}) for i, r in enumerate(records("g", 200))
    ]
    regrouped = [
        r.model_copy(update={"group": f"slide{i // 3}"}) for i, r in enumerate(records("s", 20))
    ]
    sources = {"gen": grouped, "vqa": records("v", 200), "slides": regrouped}
    sides: dict[str, set[str | None]] = {}
    for record in mix_records(sources, seed=0, settings=MixSettings(validation_share=0.3)):
        for name in filter(None, (record.image, record.group)):
            sides.setdefault(name, set()).add(record.split)
    assert all(len(split) == 1 for split in sides.values())
    assert 0.1 < sum(split == {"val"} for split in sides.values()) / len(sides) < 0.5


def test_the_split_of_one_kind_of_group_is_by_its_own_name() -> None:
    def expected(name: str) -> str:
        digest = hashlib.sha256(f"0:{name}".encode()).digest()
        return "val" if int.from_bytes(digest[:8], "big") < 0.3 * 2**64 else "train"

    alone = records("a", 60, images=20)
    grouped = [
        r.model_copy(update={"group": f"patient{int(str(r.image)[:-4]) % 7}"}) for r in alone
    ]
    settings = MixSettings(validation_share=0.3)
    for rows in (alone, grouped):
        for record in mix_records({"a": rows}, seed=0, settings=settings):
            assert record.split == expected(str(record.group or record.image))


def test_a_renamed_image_is_on_the_side_of_its_least_first_name() -> None:
    before = records("a", 60)
    after = [r.model_copy(update={"image": f"../x/{r.image}"}) for r in before]
    others = [r.model_copy(update={"image": f"z/{r.image}"}) for r in before]
    pairs = [*zip(before, after, strict=True), *zip(others, after, strict=True)]
    settings = MixSettings(validation_share=0.3)

    def sides(rows: list[Record], names: dict[str, str]) -> list[str | None]:
        return [r.split for r in mix_records({"a": rows}, settings=settings, names=names)]

    assert sides(after, {}) != sides(before, {})
    assert first_names(pairs) == first_names(reversed(pairs))
    assert sides(after, first_names(pairs)) == sides(before, {})


def test_seed_decides_and_repeats() -> None:
    sources = {"a": records("a", 50), "b": records("b", 50)}
    first = mix_records(sources, shares={"a": 1, "b": 3}, seed=0)
    assert first == mix_records(sources, shares={"a": 1, "b": 3}, seed=0)
    assert first != mix_records(sources, shares={"a": 1, "b": 3}, seed=1)


def test_ids_shared_by_two_sources_are_told_apart() -> None:
    mixed = mix_records({"a": records("x", 3), "b": records("x", 3)}, seed=0)
    assert len({r.id for r in mixed}) == 6


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"tempalte": 1.0}, "did you mean 'template'"),
        ({"template": -1.0}, "below 0"),
        ({"template": 0.0}, "add up to 0"),
        ({"empty": 1.0}, "no record"),
    ],
)
def test_wrong_shares_are_named(shares: dict[str, float], message: str) -> None:
    with pytest.raises(CloverError, match=message):
        mix_records({"template": records("t", 3), "empty": []}, shares=shares, seed=0)


def test_data_card_counts_origins_licences_and_dollars() -> None:
    card = data_card(records("a", 4), sources={"a": 9}, costs=[{"usd": 0.25}], seed=3)
    assert card["records"] == 4
    assert card["origin"] == {"a": 4}
    assert card["licence"] == {"unknown": 4}
    assert card["usd"] == 0.25
