"""The feature cache: written once, never a wrong hit, and what is broken is listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from clover.core.config import EncoderConfig
from clover.core.errors import CloverError
from clover.core.record import Record
from clover.vision.cache import FeatureCache, hash_images
from clover.vision.dataset import load_feature_set
from clover.vision.encoder import ImageEncoder, TinyEncoder
from tiny import Tiny

CONFIG = EncoderConfig(kind="tiny", image_size=32, grid=4)


class Counting(TinyEncoder):
    """Counts the images it is asked to encode."""

    def __init__(self, config: EncoderConfig = CONFIG) -> None:
        super().__init__(config)
        self.seen = 0

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return super().encode(pixels)


def write_images(folder: Path, colours: dict[str, str]) -> list[Record]:
    folder.mkdir(exist_ok=True)
    for name, colour in colours.items():
        Image.new("RGB", (40, 30), colour).save(folder / name)
    return [Record(id=name, image=name) for name in colours]


def fill(cache: Path, encoder: ImageEncoder, records: list[Record], folder: Path) -> FeatureCache:
    features = FeatureCache(cache, encoder)
    features.fill(hash_images(records, folder)[1])
    return features


def test_cached_tokens_are_the_encoders_up_to_half_precision(tmp_path: Path) -> None:
    records = write_images(tmp_path / "i", {"a.png": "red", "b.png": "teal"})
    encoder = Counting()
    cache = fill(tmp_path / "c", encoder, records, tmp_path / "i")
    digests, paths, _ = hash_images(records, tmp_path / "i")
    for record in records:
        digest = digests[str(record.image)]
        with Image.open(paths[digest]) as image:
            expected = encoder.encode(encoder.prepare(image)[None])
        torch.testing.assert_close(cache.get([digest]), expected, atol=1e-3, rtol=1e-3)


def test_a_second_fill_encodes_nothing_also_in_another_process(tmp_path: Path) -> None:
    records = write_images(tmp_path / "i", {"a.png": "red", "b.png": "teal"})
    encoder = Counting()
    fill(tmp_path / "c", encoder, records, tmp_path / "i")
    again = Counting()
    assert len(fill(tmp_path / "c", again, records, tmp_path / "i")) == 2
    assert (encoder.seen, again.seen) == (2, 0)


def test_two_names_of_the_same_bytes_are_encoded_once(tmp_path: Path) -> None:
    records = write_images(tmp_path / "i", {"a.png": "red", "b.png": "red", "c.png": "blue"})
    encoder = Counting()
    assert len(fill(tmp_path / "c", encoder, records, tmp_path / "i")) == encoder.seen == 2


def test_changed_image_bytes_are_a_miss(tmp_path: Path) -> None:
    records = write_images(tmp_path / "i", {"a.png": "red"})
    first = fill(tmp_path / "c", Counting(), records, tmp_path / "i")
    old = hash_images(records, tmp_path / "i")[0]["a.png"]
    write_images(tmp_path / "i", {"a.png": "blue"})
    encoder = Counting()
    cache = fill(tmp_path / "c", encoder, records, tmp_path / "i")
    new = hash_images(records, tmp_path / "i")[0]["a.png"]
    assert encoder.seen == 1 and new != old
    assert not torch.equal(cache.get([new]), first.get([old]))


@pytest.mark.parametrize("change", [{"grid": 8}, {"image_size": 64}])
def test_another_token_map_is_another_cache(tmp_path: Path, change: dict[str, int]) -> None:
    records = write_images(tmp_path / "i", {"a.png": "red"})
    fill(tmp_path / "c", Counting(), records, tmp_path / "i")
    other = Counting(CONFIG.model_copy(update=change))
    fill(tmp_path / "c", other, records, tmp_path / "i")
    assert other.seen == 1


def test_a_shard_without_its_index_is_made_again(tmp_path: Path) -> None:
    records = write_images(tmp_path / "i", {"a.png": "red", "b.png": "teal"})
    cache = fill(tmp_path / "c", Counting(), records, tmp_path / "i")
    digests = list(hash_images(records, tmp_path / "i")[1])
    before = cache.get(digests)
    for index in cache.path.glob("*.json"):
        index.unlink()
    encoder = Counting()
    again = fill(tmp_path / "c", encoder, records, tmp_path / "i")
    assert encoder.seen == 2
    assert torch.equal(again.get(digests), before)


def test_verify_forgets_a_torn_shard_and_it_is_made_again(tmp_path: Path) -> None:
    records = write_images(tmp_path / "i", {"a.png": "red"})
    cache = fill(tmp_path / "c", Counting(), records, tmp_path / "i")
    shard = next(cache.path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:50])
    fresh = FeatureCache(tmp_path / "c", Counting())
    assert fresh.verify() == [shard] and len(fresh) == 0
    encoder = Counting()
    fill(tmp_path / "c", encoder, records, tmp_path / "i")
    assert encoder.seen == 1


def test_an_interrupted_fill_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clover.vision.cache._SHARD", 2)
    colours = {f"{index}.png": f"#{index:02x}5070" for index in range(6)}
    records = write_images(tmp_path / "i", colours)

    class Stops(Counting):
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            if self.seen >= 4:
                raise KeyboardInterrupt
            return super().encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "c", Stops(), records, tmp_path / "i")
    encoder = Counting()
    assert len(fill(tmp_path / "c", encoder, records, tmp_path / "i")) == 6
    assert encoder.seen == 2


def test_missing_and_broken_images_are_listed_and_the_rest_is_kept(
    tiny: Tiny, tmp_path: Path
) -> None:
    write_images(tmp_path, {"good.png": "red", "torn.png": "blue"})
    torn = tmp_path / "torn.png"
    torn.write_bytes(torn.read_bytes()[:60])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    names = ["good.png", "torn.png", "text.png", "empty.png", "absent.png"]
    rows = [{"id": name, "image": name, "caption": "c"} for name in names]
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = load_feature_set(path, needs="caption", encoder=Counting(), cache=tmp_path / "c")
    assert [record.id for record in found.records] == ["good.png"]
    reasons = {Path(item.source).name: item.reason for item in found.rejected}
    assert set(reasons) == set(names[1:])
    assert reasons["absent.png"] == "missing image" and "cut off" in reasons["torn.png"]
    assert "1 records on 1 images; 4 set aside" in found.summary()


def test_no_usable_image_at_all_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"id": "a", "image": "absent.png", "caption": "c"}))
    with pytest.raises(CloverError, match=r"no record with a readable image .*missing image"):
        load_feature_set(path, needs="caption", encoder=Counting(), cache=tmp_path / "c")
