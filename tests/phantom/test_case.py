import numpy as np
import pytest

from clover.phantom.case import SIZE, TISSUES, generator, sample_case
from clover.phantom.picture import draw, render


def test_the_same_seed_split_and_index_give_the_same_bytes() -> None:
    first, again = (draw(sample_case(5, "train", 3)) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert first.regions == again.regions


@pytest.mark.parametrize("other", [(5, "validation", 3), (6, "train", 3), (5, "train", 4)])
def test_another_seed_split_or_index_gives_another_picture(other: tuple[int, str, int]) -> None:
    assert not np.array_equal(render(sample_case(5, "train", 3)), render(sample_case(*other)))


def test_no_two_splits_share_a_stream_for_any_seed_or_index() -> None:
    streams = {
        generator(seed, split, index, purpose).integers(2**63)
        for seed in (0, 1, 2, 2**40)
        for split in ("train", "validation", "test", "trai", "n")
        for index in range(20)
        for purpose in ("truth", "picture", "caption", "question")
    }
    assert len(streams) == 4 * 5 * 20 * 4


def test_findings_are_independent_of_tissue() -> None:
    cases = [sample_case(1, "train", index) for index in range(4000)]
    for tissue in TISSUES:
        members = [case for case in cases if case.tissue == tissue]
        assert 400 < len(members) < 600
        for finding in ("atypia", "mitoses", "necrosis", "fibrosis"):
            share = np.mean([getattr(case, finding) for case in members])
            assert 0.4 < share < 0.6, (tissue, finding)
        inflamed = np.mean([case.infiltrate != "none" for case in members])
        assert 0.5 < inflamed < 0.7, tissue


def test_a_lymph_node_has_no_lymphoid_infiltrate() -> None:
    nodes = [case for i in range(2000) if (case := sample_case(2, "a", i)).tissue == "lymph node"]
    assert {case.infiltrate for case in nodes} == {"none", "neutrophilic"}


def test_every_finding_with_a_place_names_it_inside_the_field() -> None:
    for index in range(60):
        case = sample_case(3, "train", index)
        regions = draw(case).regions
        named = {item.finding for item in regions}
        assert ("necrosis" in named) == case.necrosis
        assert ("infiltrate" in named) == (case.infiltrate != "none")
        assert ("mitosis" in named) == case.mitoses
        assert all(0 <= item.x < SIZE and 0 <= item.y < SIZE for item in regions)
        if case.mitoses:
            assert sum(item.finding == "mitosis" for item in regions) >= 4
