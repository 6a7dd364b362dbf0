"""A training set from a file, from a folder of shards, and from Parquet is one set."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

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


def test_names_that_are_not_utf_8_are_set_aside_and_a_folder_of_such_a_name_is_read(
    tiny: Tiny, tmp_path: Path
) -> None:
    folder = tmp_path / os.fsdecode(b"Gr\xfcn")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this disk takes UTF-8 names only")
    for name in ("good.png", os.fsdecode(b"\xfc.png")):
        Image.new("RGB", (32, 32), "red").save(folder / name)
        os.utime(folder / name, (0, 0))
    rows = [
        {"id": str(n), "image": path.name, "caption": "Liver, H&E, with fibrosis."}
        for n, path in enumerate(sorted(folder.iterdir()))
    ]
    path = folder / "c.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for _ in range(2):  # also when hashes are remembered
        encoder = load_encoder(tiny.recipe.encoder)
        found = load_feature_set(path, needs="caption", encoder=encoder, cache=tmp_path / "c")
        assert [record.image for record in found.records] == ["good.png"]
        assert [item.reason for item in found.rejected] == ["image name that is not UTF-8"]
    aside = tmp_path / "aside.jsonl"
    for words in (
        ("data", "check", path, "--out", aside),
        ("instruct", "template", path, "--out", tmp_path / "t.jsonl"),
    ):
        done = CliRunner().invoke(cli, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        assert "1 image name that is not UTF-8" in done.output or "not UTF-8" in aside.read_text()
    listed = json.loads((tmp_path / "t.jsonl.rejected.jsonl").read_text())
    assert listed["content"]["image"] == os.fsdecode(b"\xfc.png")
