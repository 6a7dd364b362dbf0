"""A training set from a file, from a folder of shards, and from Parquet is one set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from clover.cli import cli
from clover.vision.dataset import FeatureSet, load_feature_set, load_image_set
from clover.vision.encoder import load_encoder
from tiny import Tiny, tiny_recipe


def load(path: Path, tiny: Tiny, cache: Path) -> FeatureSet:
    encoder = load_encoder(tiny.recipe.encoder)
    images = tiny.folder / "data"
    return load_feature_set(path, needs="caption", encoder=encoder, cache=cache, images=images)


def test_missing_images_are_counted_and_the_rest_keeps_its_own_features(
    tiny: Tiny, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in tiny.captions.read_text().splitlines()]
    whole = load(tiny.captions, tiny, tmp_path / "c")
    for place in (0, 5, 6):
        rows.insert(place, {"id": f"lost{place}", "image": "gone.png", "caption": "nowhere"})
    rows.append({"id": "none", "caption": "no image at all"})
    path = tmp_path / "holes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load(path, tiny, tmp_path / "c")
    assert list(found.records) == list(whole.records)
    assert list(found.digests) == list(whole.digests)
    assert [item.reason for item in found.rejected] == ["missing image"]  # by image, not by record
    every = range(len(found.records))
    assert torch.equal(found.features(every), whole.features(every))
    one = [whole.digests[7]]
    assert torch.equal(found.features([7]), whole.cache.get(one))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_align_learns_the_same_from_a_folder_of_shards(
    kind: str, tiny: Tiny, tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        tiny.folder, align={"steps": 4}, data={"images": str(tiny.folder / "data")}
    )
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml())
    lines = tiny.captions.read_text().splitlines(keepends=True)
    shards = tmp_path / "shards"
    shards.mkdir()
    for part in range(3):
        text = "".join(lines[8 * part : 8 * part + 8])
        (shards / f"part-{part}.jsonl").write_text(text)
        if kind == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            rows = [json.loads(line) for line in text.splitlines()]
            parquet.write_table(pyarrow.Table.from_pylist(rows), shards / f"part-{part}.parquet")
            (shards / f"part-{part}.jsonl").unlink()
    weights = []
    for data in (tiny.captions, shards):
        out = tmp_path / f"run-{data.stem}"
        command = ["align", "--recipe", str(tmp_path / "tiny.yaml"), "--data", str(data)]
        command += ["--out", str(out), "--features", str(tmp_path / "cache")]
        done = CliRunner().invoke(cli, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert "24 records on 24 images" in done.output
        weights.append((out / "align.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_an_image_that_is_a_folder_is_missing(tiny: Tiny, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in tiny.captions.read_text().splitlines()]
    path = tmp_path / "folder.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [{**rows[0], "image": "images/"}, *rows[1:]])
    )
    found = load(path, tiny, tmp_path / "c")
    assert len(found.records) == len(rows) - 1
    assert [item.reason for item in found.rejected] == ["missing image"]


def test_held_out_data_may_be_a_folder_or_parquet(tiny: Tiny, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in tiny.captions.read_text().splitlines()]
    images, shards = tiny.folder / "data", tmp_path / "shards"
    shards.mkdir()
    (shards / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    (shards / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[9:]))
    parquet = tmp_path / "one.parquet"
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), parquet)
    whole = load_image_set(tiny.captions, images)
    for path in (shards, parquet):
        found = load_image_set(path, images, unpacked=tmp_path / "unpacked")
        assert found.records == whole.records and found.digests == whole.digests
