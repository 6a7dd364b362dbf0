from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from clover.phantom.case import STAINS, TISSUES, Case, Region, sample_case
from clover.phantom.picture import draw, render

PLAIN: dict[str, Any] = {
    "cellularity": "moderate",
    "atypia": False,
    "mitoses": False,
    "infiltrate": "none",
    "necrosis": False,
    "fibrosis": False,
    "regions": (),
}
MIDDLE = (112.0, 112.0, 45.0, 45.0)


def case_of(index: int, **changes: Any) -> Case:
    return replace(sample_case(9, "test", index), **(PLAIN | changes))


def red(case: Case) -> NDArray[np.float64]:
    """Haematoxylin takes most of the red: dark red channel means nuclei."""
    return render(case)[:, :, 0].astype(float)


@pytest.mark.parametrize("tissue", TISSUES)
@pytest.mark.parametrize("stain", STAINS)
def test_every_tissue_is_painted_in_every_stain(tissue: Any, stain: Any) -> None:
    image = render(case_of(0, tissue=tissue, stain=stain))
    assert image.shape == (224, 224, 3) and image.dtype == np.uint8
    assert image.std(axis=(0, 1)).min() > 8


@pytest.mark.parametrize("tissue", TISSUES)
def test_higher_cellularity_has_more_nuclei(tissue: Any) -> None:
    from clover.phantom import tissue as room
    from clover.phantom.canvas import Canvas

    counts: dict[str, float] = {}
    for level in ("low", "moderate", "high"):
        total = 0
        for index in range(4):
            case = case_of(index, tissue=tissue, cellularity=level)
            canvas = Canvas(case)
            room.paint(canvas, case.generator("picture"))
            points = np.concatenate([item.points for item in canvas.sites])
            total += int(np.all((points >= 0) & (points < 224), axis=1).sum())
        counts[level] = total / 4
    assert counts["low"] * 1.35 < counts["moderate"]
    assert counts["moderate"] * 1.35 < counts["high"]


@pytest.mark.parametrize("tissue", TISSUES)
@pytest.mark.parametrize("stain", STAINS)
def test_mitoses_are_the_darkest_thing_at_the_places_they_name(tissue: Any, stain: Any) -> None:
    case = case_of(1, tissue=tissue, stain=stain, mitoses=True)
    picture = draw(case)
    grey = picture.image.mean(axis=2)
    floor = np.quantile(grey, 0.02)
    places = [item for item in picture.regions if item.finding == "mitosis"]
    assert len(places) >= 4
    for item in places:
        x, y = round(item.x), round(item.y)
        assert grey[y - 6 : y + 7, x - 6 : x + 7].min() <= floor


@pytest.mark.parametrize("kind", ["lymphoid", "neutrophilic"])
def test_an_infiltrate_darkens_its_place(kind: Any) -> None:
    place = Region("infiltrate", *MIDDLE)
    case = case_of(2, tissue="adipose tissue", infiltrate=kind, regions=(place,))
    inside, without = red(case)[90:135, 90:135], red(case_of(2, tissue="adipose tissue"))
    assert (inside < 130).mean() > 0.2 > (without[90:135, 90:135] < 130).mean()


def test_necrosis_leaves_few_nuclei_at_its_place() -> None:
    place = Region("necrosis", *MIDDLE)
    dead = red(case_of(3, tissue="smooth muscle", necrosis=True, regions=(place,)))
    alive = red(case_of(3, tissue="smooth muscle"))
    window = np.s_[85:140, 85:140]
    assert (dead[window] < 120).mean() < 0.5 * (alive[window] < 120).mean()


def test_fibrosis_lays_collagen_over_a_quarter_of_the_field() -> None:
    from clover.phantom import finding
    from clover.phantom.canvas import Canvas

    case = case_of(4, tissue="liver", fibrosis=True)
    canvas = Canvas(case)
    finding.fibrosis(canvas, case.generator("picture"))
    assert 0.2 < (canvas.collagen > 0.2).mean() < 0.6


def test_brightness_alone_does_not_tell_the_tissue() -> None:
    """Nearest neighbours of (mean, deviation) of R, G, B name the tissue in under half."""
    cases = [sample_case(21, "train", index) for index in range(160)]
    images = np.stack([render(case) for case in cases]) / 255.0
    features = np.concatenate([images.mean(axis=(1, 2)), images.std(axis=(1, 2))], axis=1)
    features = (features - features.mean(0)) / features.std(0)
    distance = ((features[:, None] - features[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1)[:, :9]
    tissue = np.array([TISSUES.index(case.tissue) for case in cases])
    guessed = np.array([np.bincount(tissue[row], minlength=8).argmax() for row in nearest])
    assert (guessed == tissue).mean() < 0.5


def test_masks_say_where_findings_were_painted_and_nothing_else_changed() -> None:
    x, y, *radii = MIDDLE
    place = Region("necrosis", x, y, *radii)
    plain = case_of(3, tissue="liver")
    assert draw(plain).masks == {}
    picture = draw(replace(plain, necrosis=True, regions=(place,)))
    assert set(picture.masks) == {"necrosis"}
    mask = picture.masks["necrosis"]
    rows, columns = np.mgrid[:224, :224]
    ellipse = ((columns - x) / radii[0]) ** 2 + ((rows - y) / radii[1]) ** 2 <= 1
    assert (mask & ellipse).sum() / (mask | ellipse).sum() > 0.75
    # The ragged edge is the painted one: nuclei are gone inside it, and stand outside.
    dark = picture.image[:, :, 0] < np.percentile(picture.image[:, :, 0], 15)
    assert dark[~mask].mean() > 2 * dark[mask].mean()
