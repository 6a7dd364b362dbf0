"""Regions of slides wherever an evaluation opens an image: features, controls, baselines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from clover.cli import cli
from clover.core.record import Record
from clover.evaluate.baseline import colour_features
from tiny import QUESTION, Tiny, tiny_clover


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    """Return a folder of a model whose encoder states its µm per pixel."""
    encoder = {**tiny.recipe.encoder.model_dump(), "microns_per_pixel": 0.5}
    recipe = tiny.recipe.model_validate({**tiny.recipe.model_dump(), "encoder": encoder})
    return tiny_clover(recipe).save(tmp_path / "model")


def write_questions(path: Path, images: list[str]) -> None:
    """Write an open question and a closed one about each image."""
    kinds = ((QUESTION, "liver", "open"), ("is this liver ?", "yes", "closed"))
    rows = [
        {
            "id": f"{kind}{place}",
            "image": image,
            "question": question,
            "answer": answer,
            "answer_type": kind,
        }
        for place, image in enumerate(images)
        for question, answer, kind in kinds
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_slide(path: Path, *, seed: int) -> Path:
    """Write a TIFF of 96 x 64 px that states 0.5 µm a pixel: a slide without OpenSlide."""
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    pixels[:, 48:] //= 2  # the right half is darker
    Image.fromarray(pixels).save(path, resolution=1e4 / 0.5, resolution_unit=3)
    return path


def test_all_controls_and_baselines_read_regions_of_slides(model: Path, tmp_path: Path) -> None:
    for name, seed in (("asked", 0), ("learnt", 1)):
        slide = write_slide(tmp_path / f"{name}.tif", seed=seed)
        regions = [f"{slide.name}#{x},0,16,16" for x in (0, 16, 30)]
        write_questions(tmp_path / f"{name}.jsonl", regions)
    command = (
        *("evaluate", model, "--data", tmp_path / "asked.jsonl", "--controls", "all"),
        *("--train", tmp_path / "learnt.jsonl", "--features", tmp_path / "features"),
        *("--out", tmp_path / "out", "--allow-leaks"),
    )
    done = CliRunner().invoke(cli, [str(argument) for argument in command])
    assert done.exit_code == 0, str(done.exception)
    assert "6 records on 3 images\n" in done.output
    assert "colour alone" in done.output and "stains shifted" in done.output


def test_a_baseline_sees_the_region_and_not_the_slide(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "slide.tif", seed=0)
    names = [f"{slide.name}#0,0,20,20", f"{slide.name}#26,0,20,20"]
    records = [Record(id=name, image=name) for name in names]
    left, right = colour_features(records, tmp_path, 0.5)
    pixels = np.asarray(Image.open(slide), dtype=float)
    assert left[:3] == pytest.approx(pixels[:40, :40].mean(axis=(0, 1)), abs=0.6)
    assert right[:3] == pytest.approx(pixels[:40, 52:92].mean(axis=(0, 1)), abs=0.6)
