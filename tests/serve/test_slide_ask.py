"""`clover ask` on slides: a region, a reference, a tour; and one line for every mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.slides.conftest import SLIDE_MPP, halved, write_header, write_pyramid

from clover.cli import main
from clover.core.files import read_json
from clover.model import load
from clover.serve.tour import FieldAnswer, Tour, _colours, mixed
from clover.slides.region import Region
from tiny import QUESTION


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose field of view is 179 µm: 32 px of 5.6 µm."""
    to = tmp_path_factory.mktemp("scaled") / "model"
    shutil.copytree(tiny_model, to)
    config = read_json(to / "config.json")
    config["recipe"]["encoder"]["microns_per_pixel"] = 5.6
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a picture of 800 x 600 px, pink on the left and glass on the right."""
    random = np.random.default_rng(0)
    image = np.full((600, 800, 3), 244) + random.integers(-3, 4, (600, 800, 3))
    image[:, :400] = np.array((200, 110, 160)) + random.integers(-25, 26, (600, 400, 3))
    path = tmp_path_factory.mktemp("pictures") / "pink.png"
    Image.fromarray(image.astype(np.uint8)).save(path)
    return path


def test_a_region_is_asked_about_as_the_same_crop_would_be(
    model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At 5.6 µm/px the picture is at the model's own scale: a region is a crop of its pixels.
    place = ["--region", "112,56,179.2,179.2", "--mpp", "5.6", "--json"]
    code, out, _ = run(["ask", str(model), str(picture), QUESTION, *place], capsys)
    row = json.loads(out)
    crop = tmp_path / "crop.png"
    Image.open(picture).crop((20, 10, 52, 42)).save(crop)
    assert code == 0 and row["answer"] == load(model).ask(crop, QUESTION).text
    assert (row["region"], row["microns_per_pixel"]) == ("112,56,179.2,179.2", 5.6)


def test_a_region_of_another_size_is_noted(
    model: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--region", "0,0,716.8,716.8", "--mpp", "5.6"]
    code, out, err = run(["ask", str(model), str(picture), QUESTION, *place], capsys)
    assert code == 0 and out.count("\n") == 1
    assert "seen at 22 µm/px, the model learnt at 5.6" in err


def test_a_reference_is_read_wherever_an_image_is(
    model: Path, svs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = f"{svs}#560,560,179.2,179.2"
    _, by_reference, _ = run(["ask", str(model), reference, QUESTION], capsys)
    place = ["--region", "560,560,179.2,179.2"]
    _, by_region, _ = run(["ask", str(model), str(svs), QUESTION, *place], capsys)
    assert by_reference == by_region == load(model).ask(reference, QUESTION).text + "\n"


def test_records_of_regions_get_features_and_scores(
    model: Path, svs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(svs, tmp_path / "slide.svs")
    regions = ["560,560,179.2,179.2", "450,1200,179.2,179.2", "9999,0,10,10"]
    rows = [
        {
            "id": str(number),
            "image": f"slide.svs#{region}",
            "question": QUESTION,
            "answer": "liver",
            "answer_type": "open",
        }
        for number, region in enumerate(regions)
    ]
    data = tmp_path / "vqa.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    arguments = ["evaluate", str(model), "--data", str(data), "--out", str(out)]
    code, _, err = run([*arguments, "--features", str(tmp_path / "features")], capsys)
    assert code == 0, err
    lines = (out / "predictions.jsonl").read_text().splitlines()
    told = [row for row in map(json.loads, lines) if "prediction" in row]
    assert [row["id"] for row in told] == ["0", "1"]
    answers = [load(model).ask(f"{svs}#{region}", QUESTION).text for region in regions[:2]]
    assert [row["prediction"] for row in told] == answers


@pytest.mark.parametrize("mpp", [0.8, 1.6])
def test_the_same_tissue_gets_the_same_answer_from_every_scan(
    tiny_model: Path, scans: dict[str, tuple[Path, str | None]], tmp_path: Path, mpp: float
) -> None:
    from clover.slides.reader import open_slide
    from clover.slides.units import parse_microns_per_pixel

    model = load(tiny_model)
    answers = {}
    for name, (path, stated) in scans.items():
        with open_slide(path, parse_microns_per_pixel(stated) if stated else None) as slide:
            picture = slide.read(Region(560, 560, 179.2, 179.2), mpp)
        answers[name] = model.ask(picture, QUESTION).text
    assert len(answers) == 6 and len(set(answers.values())) == 1, answers


def test_a_tour_counts_agrees_draws_and_goes_on(
    model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tour"
    tour = ["ask", str(model), str(picture), "--tour", QUESTION, "--mpp", "5.6", "--out", str(out)]
    code, said, err = run([*tour, "--json"], capsys)
    row = json.loads(said)
    # 25 x 18 fields of 32 px; the left half is tissue.
    assert code == 0 and row["asked"] == 100 and 200 < row["tissue_fields"] < 235
    assert sum(row["counts"].values()) == 100 and len(row["fields"]) == 100
    assert row["agreement"] == max(row["counts"].values()) / 100
    assert all(float(field["region"].split(",")[0]) < 2240 for field in row["fields"])
    assert Image.open(out / "heat-map.png").width >= 640
    lines = (out / "tour.jsonl").read_text().splitlines()
    assert len(lines) == 100
    # Stopped in the middle of a line, it goes on where it was.
    (out / "tour.jsonl").write_text("\n".join(lines[:40]) + "\n" + lines[40][:25])
    code, said, _ = run([*tour, "--json"], capsys)
    assert code == 0 and json.loads(said) == row
    code, _, err = run([*tour[:4], "another ?", *tour[5:]], capsys)
    assert code == 2 and "of another question, slide or model" in err
    code, said, _ = run([*tour, "--region", "0,0,1000,1000", "--fields", "9"], capsys)
    assert code == 0 and "9 of 25 tissue fields of 179 µm" in said


def test_counts_and_agreement_are_of_the_fields() -> None:
    answers = ["no", "no", "yes", "no"]
    fields = [
        FieldAnswer(Region(n, 0, 1, 1), text, 0.1 if text == "no" else 0.8)
        for n, text in enumerate(answers)
    ]
    tour = Tour("is it ?", 1.0, fields, 9, "m")
    assert tour.counts() == [("no", 3), ("yes", 1)] and tour.agreement == 0.75
    assert tour.row()["fields"][2] == {"region": "2,0,1,1", "answer": "yes", "yes": 0.8}


def tour_of(answers: list[str]) -> Tour:
    fields = [FieldAnswer(Region(n, 0, 1, 1), text, None) for n, text in enumerate(answers)]
    return Tour("is it ?", 1.0, fields, len(answers), "m")


def test_another_spelling_is_no_other_answer() -> None:
    closed = tour_of(["Yes", "yes.", "Yes, there is.", "yes"])
    assert closed.counts() == [("yes", 4)] and closed.agreement == 1.0
    assert [field["answer"] for field in closed.row()["fields"]][2] == "Yes, there is."
    unsure = tour_of(["No.", "no", "Not seen.", "not seen", "Yes"])
    assert unsure.counts() == [("Not seen", 2), ("no", 2), ("yes", 1)]
    # To an open question a few answers that begin with no are no noes.
    named = tour_of(["HER2 positive.", "HER2 positive", "her2  positive", "No tumour", "no cells"])
    assert named.counts() == [("HER2 positive", 3), ("No tumour", 1), ("no cells", 1)]
    assert _colours(named)[0][0] == _colours(named)[0][2] != _colours(named)[0][3]


def test_colours_run_from_no_by_way_of_light_to_yes() -> None:
    assert mixed(0.0)[2] > mixed(0.0)[0] and mixed(1.0)[0] > mixed(1.0)[2]
    assert min(mixed(0.5)) > 240


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["q", "--region", "0,0,50,50"], "does not state its µm per pixel; give it with --mpp"),
        (["q", "--region", "0,0,50", "--mpp", "1"], "'0,0,50' is no region"),
        (["q", "--region", "0,0,5000,50", "--mpp", "1"], "reaches beyond pink.png"),
        (["q", "--region", "0,0,50,50", "--mpp", "wide"], "'wide' is no size of a pixel"),
        (["q", "--region", "0,0,50,50", "--mpp", "estimate"], "states no objective"),
        (["q", "--tour", "q ?", "--mpp", "1"], "'q' is one too many"),
        (["--tour", " ", "--mpp", "1"], "the question is empty"),
        (["--tour", "q ?", "--mpp", "0.1"], "hold no field of 179 µm"),
        (["--tour", "q ?"], "does not state its µm per pixel"),
        ([], "the question is empty"),
    ],
)
def test_every_mistake_is_one_line_and_exit_code_2(
    model: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    code, out, err = run(["ask", str(model), str(picture), *more], capsys)
    assert (code, out) == (2, "") and err.count("\n") == 1 and words in err


def test_a_model_that_states_no_scale_is_shown_no_region(
    tiny_model: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--region", "0,0,50,50", "--mpp", "1"]
    code, _, err = run(["ask", str(tiny_model), str(picture), QUESTION, *place], capsys)
    assert code == 2 and "set encoder.microns_per_pixel" in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def tiff(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the shared slide as other scanners write it: a tiled pyramid named .tiff."""
    half = halved(pixels)
    to = tmp_path_factory.mktemp("tiff") / "slide.tiff"
    return write_pyramid(to, [pixels, half, halved(half)], mpp=SLIDE_MPP)


def test_a_whole_slide_that_is_a_tiff_is_refused_with_the_way_out(
    model: Path, tiff: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--mpp", "0.5"]):
        code, _, err = run(["ask", str(model), str(tiff), QUESTION, *more], capsys)
        assert code == 2 and err.count("\n") == 1
        assert "is a whole slide (2,220 x 2,967 px, tiled and with smaller levels)" in err
        assert "--region" in err and "--tour" in err
    code, out, _ = run(
        ["ask", str(model), str(tiff), QUESTION, "--region", "560,560,179.2,179.2"], capsys
    )
    assert code == 0 and out == load(model).ask(f"{tiff}#560,560,179.2,179.2", QUESTION).text + "\n"


def test_a_tiff_too_large_for_pillow_is_refused_with_the_way_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(
        ["ask", str(model), str(write_header(tmp_path / "huge.tif", 20_000, 10_000)), QUESTION],
        capsys,
    )
    assert code == 2 and err.count("\n") == 1 and "--region" in err
    assert "20,000 x 10,000 px, a field of view has at most 64,000,000 pixels" in err


def test_a_whole_slide_is_refused_with_the_way_out(
    model: Path, svs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["ask", str(model), str(svs), QUESTION], capsys)
    assert code == 2 and "--region" in err and "--tour" in err
    cut = tmp_path / "cut.svs"
    cut.write_bytes(svs.read_bytes()[:300_000])
    code, _, err = run(["ask", str(model), str(cut), QUESTION, "--region", "1,1,9,9"], capsys)
    assert code == 2 and "cut off" in err and err.count("\n") == 1
