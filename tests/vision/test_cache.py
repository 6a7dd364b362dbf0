"""The feature cache: written once, never a wrong hit, and what is broken is listed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from clover.cli import cli
from clover.core.config import EncoderConfig
from clover.core.digests import DigestMemory
from clover.core.errors import CloverError
from clover.core.record import Record
from clover.vision import shard as shard_file
from clover.vision.cache import FeatureCache
from clover.vision.dataset import FeatureSet, load_feature_set
from clover.vision.encoder import ImageEncoder, TinyEncoder
from clover.vision.image_processor import draw_view, rand_augment
from clover.vision.shard import checksum, open_shard, write_shard
from clover.vision.storage import Storage, pack, unpack
from hashed import hash_images
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


class Dazzled(Counting):
    """Gives no number, or one that half precision has not, of an image that is white."""

    value = float("nan")

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = super().encode(pixels)
        tokens[pixels.flatten(1).amin(dim=1) == 1, 0, 0] = self.value
        return tokens


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_tokens_that_are_no_finite_numbers_are_never_kept(
    tmp_path: Path, storage: Storage, value: float
) -> None:
    colours = {f"{index}.png": "white" if index == 3 else f"#0000{index:02x}" for index in range(7)}
    records = write_images(tmp_path / "images", colours)
    encoder = Dazzled()
    encoder.value, encoder.batch_size = value, 2
    files = hash_images(records, tmp_path / "images")[1]
    cache = FeatureCache(tmp_path / "cache", encoder, storage=storage)
    rejected = cache.fill(files)
    white = [digest for digest, path in files.items() if path.name == "3.png"]
    if value == 1e6 and storage != "float16":
        assert not rejected and len(cache) == 7
        return
    assert [Path(item.source).name for item in rejected] == ["3.png"]
    assert f"not all finite numbers in {storage}" in rejected[0].reason
    kept = [digest for digest in files if digest not in white]
    assert len(cache) == 6 and not any(digest in cache for digest in white)
    expected = FeatureCache(tmp_path / "whole", Counting(), storage=storage)
    expected.fill(files)
    torch.testing.assert_close(cache.get(kept), expected.get(kept), atol=1e-2, rtol=1e-2)


def test_a_data_set_without_one_finite_token_is_one_line(tmp_path: Path) -> None:
    records = write_images(tmp_path / "images", {"a.png": "white", "b.png": "white"})
    lines = "".join(
        json.dumps({"id": r.id, "image": r.image, "caption": "c"}) + "\n" for r in records
    )
    (tmp_path / "images" / "c.jsonl").write_text(lines)
    with pytest.raises(CloverError, match="its tokens are not all finite numbers in float16"):
        load_feature_set(
            tmp_path / "images" / "c.jsonl",
            needs="caption",
            encoder=Dazzled(),
            cache=tmp_path / "cache",
        )


def test_no_usable_image_at_all_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps({"id": "a", "image": "absent.png", "caption": "c"}))
    with pytest.raises(CloverError, match=r"no record with a readable image .*missing image"):
        load_feature_set(path, needs="caption", encoder=Counting(), cache=tmp_path / "c")


def flip(shard: Path, *, places_from_end: int = 10) -> None:
    data = bytearray(shard.read_bytes())
    data[-places_from_end] ^= 0x40
    shard.write_bytes(data)


def test_flipped_bits_are_found_named_set_aside_and_made_again(tmp_path: Path) -> None:
    records = write_images(tmp_path / "i", {"a.png": "red", "b.png": "teal"})
    cache = fill(tmp_path / "c", Counting(), records, tmp_path / "i")
    digests = list(hash_images(records, tmp_path / "i")[1])
    before = cache.get(digests)
    shard = next(cache.path.glob("*.safetensors"))
    flip(shard)  # in the last row
    fresh = FeatureCache(tmp_path / "c", Counting())
    assert torch.equal(fresh.get(digests[:1]), before[:1]), "a whole row of it is still read"
    with pytest.raises(CloverError, match=f"{shard.name} has flipped bits and is set aside as"):
        fresh.get(digests)
    assert not shard.exists() and (shard.parent / "broken" / shard.name).exists()
    encoder = Counting()
    again = fill(tmp_path / "c", encoder, records, tmp_path / "i")
    assert encoder.seen == 2 and torch.equal(again.get(digests), before)


def test_verify_finds_a_flipped_bit_anywhere_in_the_file(tmp_path: Path) -> None:
    records = write_images(tmp_path / "i", {"a.png": "red"})
    cache = fill(tmp_path / "c", Counting(), records, tmp_path / "i")
    shard = next(cache.path.glob("*.safetensors"))
    assert FeatureCache(tmp_path / "c", Counting()).verify() == []
    flip(shard, places_from_end=shard.stat().st_size - 9)  # in the header
    fresh = FeatureCache(tmp_path / "c", Counting())
    assert fresh.verify() == [shard] and len(fresh) == 0


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_verify_finds_any_byte_that_changes(storage: Storage, tmp_path: Path) -> None:
    tokens = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "shard-0.safetensors"
    keys = [f"{row:064x}" for row in range(2)]
    parts = [pack(image, storage) for image in torch.split(tokens, 1)]
    shard = write_shard(path, keys, parts, storage=storage, encoder="tiny")
    again, found = open_shard(shard.index)
    assert found == keys and again.damage() is None
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (1, 128):
            changed = bytearray(content)
            changed[place] ^= bit
            path.write_bytes(changed)
            assert open_shard(shard.index)[0].damage() in ("flipped bits", "torn"), place
    path.write_bytes(content)
    assert again.damage() is None


def test_the_checksum_is_the_weighted_sum_of_its_words() -> None:
    kept = {
        "tokens": torch.arange(-7, 8, dtype=torch.int8),  # 15 bytes: a word and a piece
        "scale": torch.tensor([1.5, -2.0, 3.0]),
    }
    total = 0
    for name in ("scale", "tokens"):
        content = kept[name].numpy().tobytes()
        words = [int.from_bytes(content[at : at + 8], "little") for at in range(0, len(content), 8)]
        total = 3 * total + sum((2 * place + 1) * word for place, word in enumerate(words))
    assert checksum(kept) == total % 2**64


def test_a_cache_with_the_sums_of_the_release_before_is_read_and_verified(tmp_path: Path) -> None:
    records = write_images(tmp_path / "i", {"a.png": "red", "b.png": "teal"})
    digests = list(hash_images(records, tmp_path / "i")[1])
    folder = FeatureCache(tmp_path / "c", Counting()).path
    tokens = torch.randn(2, 16, 24).half()
    shard = folder / "shard-0.safetensors"
    save_file({"tokens": tokens}, str(shard))
    content = shard.read_bytes()
    index = {
        "images": digests,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "sums": [zlib.crc32(row.numpy().tobytes()) for row in tokens],
    }
    shard.with_suffix(".json").write_text(json.dumps(index))
    cache = FeatureCache(tmp_path / "c", Counting())
    assert cache.verify() == [] and torch.equal(cache.get(digests), tokens.float())
    flip(shard)
    with pytest.raises(CloverError, match="flipped bits"):
        FeatureCache(tmp_path / "c", Counting()).get(digests)


def test_a_torn_index_is_set_aside_and_its_images_are_made_again(tmp_path: Path) -> None:
    records = write_images(tmp_path / "i", {"a.png": "red"})
    cache = fill(tmp_path / "c", Counting(), records, tmp_path / "i")
    index = next(cache.path.glob("shard-*.json"))
    index.write_text(index.read_text()[:20])
    encoder = Counting()
    again = fill(tmp_path / "c", encoder, records, tmp_path / "i")
    assert encoder.seen == 1 and len(again) == 1 and len(again.set_aside) == 1


def test_a_cache_of_the_first_release_is_read(tmp_path: Path) -> None:
    records = write_images(tmp_path / "i", {"a.png": "red", "b.png": "teal"})
    digests = list(hash_images(records, tmp_path / "i")[1])
    empty = FeatureCache(tmp_path / "c", Counting())
    tokens = torch.randn(2, 16, 24).half()
    save_file({"tokens": tokens}, str(empty.path / "shard-00000.safetensors"))
    index = {"images": digests, "encoder": "tiny/patches"}
    (empty.path / "shard-00000.json").write_text(json.dumps(index, indent=2))
    encoder = Counting()
    cache = fill(tmp_path / "c", encoder, records, tmp_path / "i")
    assert encoder.seen == 0 and torch.equal(cache.get(digests), tokens.float())
    assert cache.verify() == []


def test_int8_keeps_each_token_within_half_a_step_of_its_own_scale() -> None:
    tokens = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    tokens[0, 0] *= 1000  # one loud token costs the others nothing
    tokens[1, 1] = 0
    kept = pack(tokens, "int8")
    assert kept["tokens"].dtype == torch.int8 and kept["scale"].shape == (3, 5)
    step = tokens.abs().amax(dim=-1, keepdim=True) / 127
    assert bool(((unpack(kept) - tokens).abs() <= step / 2 + 1e-6 * step).all())
    assert torch.equal(unpack(kept)[1, 1], torch.zeros(32))


@pytest.mark.parametrize(("storage", "error"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_another_storage_is_another_cache_and_close_to_the_encoder(
    tmp_path: Path, storage: Storage, error: float
) -> None:
    records = write_images(tmp_path / "i", {"a.png": "#a03060", "b.png": "teal"})
    paths = hash_images(records, tmp_path / "i")[1]
    half = fill(tmp_path / "c", Counting(), records, tmp_path / "i")
    encoder = Counting()
    other = FeatureCache(tmp_path / "c", encoder, storage=storage)
    other.fill(paths)
    assert encoder.seen == 2 and other.path != half.path
    exact, kept = half.get(list(paths)), other.get(list(paths))
    largest = exact.abs().amax(dim=-1, keepdim=True)
    assert bool(((kept - exact).abs() <= error * largest + 1e-3).all())
    assert not torch.equal(kept, exact)


def write_noise(folder: Path, count: int) -> list[Record]:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    names = [f"{index}.png" for index in range(count)]
    for name in names:
        pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return [Record(id=name, image=name) for name in names]


def test_views_are_made_once_differ_and_are_the_same_everywhere(tmp_path: Path) -> None:
    records = write_noise(tmp_path / "i", 3)
    paths = hash_images(records, tmp_path / "i")[1]
    digests = list(paths)
    encoder = Counting()
    cache = FeatureCache(tmp_path / "c", encoder, views=3)
    assert cache.fill(paths) == [] and encoder.seen == 9 and len(cache) == 3
    plain = cache.get(digests)
    first, second = cache.get(digests, [1, 1, 1]), cache.get(digests, [2, 2, 2])
    assert not torch.equal(plain, first) and not torch.equal(first, second)
    elsewhere = FeatureCache(tmp_path / "d", Counting(), views=3)
    elsewhere.fill(dict(reversed(paths.items())))
    assert torch.equal(elsewhere.get(digests, [2, 2, 2]), second)
    fewer = Counting()
    FeatureCache(tmp_path / "c", fewer).fill(paths)
    assert fewer.seen == 0, "a reader of one view makes none"
    more = FeatureCache(tmp_path / "c", encoder, views=4)
    assert digests[0] in more and not more.is_whole(digests[0])
    assert cache.is_whole(digests[0])


def test_augmented_views_are_the_published_training_processor(tmp_path: Path) -> None:
    records = write_noise(tmp_path / "i", 4)
    paths = hash_images(records, tmp_path / "i")[1]
    caches = {}
    for kind in ("crop", "augment"):
        caches[kind] = FeatureCache(tmp_path / "c", Counting(), views=3, view_kind=kind)
        assert caches[kind].fill(paths) == []
    changed = 0
    for digest, path in paths.items():
        for view in (1, 2):
            random = np.random.default_rng([int(digest[:16], 16), view])
            with Image.open(path) as image:
                drawn = draw_view(image, 32, random)
            encoder = Counting()
            tokens = {
                kind: encoder.encode(encoder.prepare(picture)[None])[0]
                for kind, picture in (("crop", drawn), ("augment", rand_augment(drawn, random)))
            }
            for kind, expected in tokens.items():
                found = caches[kind].get([digest], [view])[0]
                assert torch.allclose(found, expected, atol=1e-3), kind
            changed += not torch.equal(tokens["crop"], tokens["augment"])
    assert changed >= 2, "some draw does something"


def test_turned_views_are_the_seven_ways_to_turn_and_mirror_an_image(tmp_path: Path) -> None:
    records = write_noise(tmp_path / "i", 1)
    (digest, path), *_ = paths = list(hash_images(records, tmp_path / "i")[1].items())
    encoder = Counting()
    cache = FeatureCache(tmp_path / "c", encoder, views=8, view_kind="turn")
    assert cache.fill(dict(paths)) == [] and encoder.seen == 8
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    expected = [
        encoder.encode(encoder.prepare(Image.fromarray(np.rot90(side, turns)))[None])[0]
        for side in (pixels, pixels[:, ::-1])
        for turns in range(4)
    ]
    views = [cache.get([digest], [view])[0] for view in range(8)]
    assert torch.allclose(views[0], expected[0], atol=1e-3)  # float16
    places = [
        [bool(torch.allclose(view, want, atol=1e-3)) for want in expected].index(True)
        for view in views
    ]
    assert sorted(places) == list(range(8)), "each way once"
    with pytest.raises(ValueError, match="views 9: there are 8"):
        EncoderConfig(views=9, view_kind="turn")


def test_training_draws_views_by_its_seed_and_evaluation_sees_the_image_as_it_is(
    tmp_path: Path,
) -> None:
    records = write_noise(tmp_path, 4)
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(json.dumps({**r.row(), "caption": "c"}) for r in records))

    def load(views: int) -> FeatureSet:
        return load_feature_set(
            path, needs="caption", encoder=Counting(), cache=tmp_path / "c", views=views
        )

    several, one, every = load(4), load(1), [0, 1, 2, 3] * 5
    torch.manual_seed(5)
    first = several.features(every)
    state = torch.get_rng_state()
    second = several.features(every)
    torch.set_rng_state(state)
    assert torch.equal(several.features(every), second) and not torch.equal(first, second)
    assert torch.equal(one.features(every), one.features(every))
    assert torch.equal(one.features(every), several.cache.get([one.digests[i] for i in every]))


def test_a_full_disk_keeps_the_shards_before_and_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clover.vision.cache._SHARD", 2)
    records = write_noise(tmp_path / "i", 6)
    real, written = shard_file._pieces, []

    def full(parts: Sequence[dict[str, torch.Tensor]]) -> Iterator[memoryview]:
        written.append(1)
        for piece in real(parts):
            yield piece
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_file, "_pieces", full)
    with pytest.raises(CloverError, match=r"cannot write .*shard-.*No space left.*free some space"):
        fill(tmp_path / "c", Counting(), records, tmp_path / "i")
    assert not list((tmp_path / "c").rglob("*.part"))
    encoder = Counting()
    assert len(fill(tmp_path / "c", encoder, records, tmp_path / "i")) == 6
    assert encoder.seen == 2


def test_processes_that_share_a_folder_encode_every_image_once(tmp_path: Path) -> None:
    records = write_noise(tmp_path / "i", 40)
    paths = hash_images(records, tmp_path / "i")[1]
    script = tmp_path / "work.py"
    script.write_text(
        "import json, os, sys, time, torch\n"
        "from pathlib import Path\n"
        "import clover.vision.cache as cache\n"
        "from clover.core.config import EncoderConfig\n"
        "from clover.vision.encoder import TinyEncoder\n"
        "class Slow(TinyEncoder):\n"
        "    def encode(self, pixels):\n"
        "        # Neither goes on until both have begun: however slow one of them starts.\n"
        "        here = Path(sys.argv[1]).parent\n"
        "        (here / f'begun-{os.getpid()}').touch()\n"
        "        while len(list(here.glob('begun-*'))) < 2:\n"
        "            time.sleep(0.01)\n"
        "        return super().encode(pixels)\n"
        "cache._SHARD = cache._AHEAD = 4\n"
        "torch.set_num_threads(1)\n"
        "config = EncoderConfig(kind='tiny', image_size=32, grid=4, batch_size=2)\n"
        "encoder = Slow(config)\n"
        "images = {key: Path(p) for key, p in json.loads(Path(sys.argv[1]).read_text()).items()}\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "found = cache.FeatureCache(sys.argv[2], encoder)\n"
        "assert found.fill(images) == []\n"
        "print(found.num_encoded, len(found))\n"
    )
    listed = tmp_path / "images.json"
    listed.write_text(json.dumps({key: str(path) for key, path in paths.items()}))
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(listed), str(tmp_path / "c")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for worker in workers:  # both are up before either starts
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    results = []
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        results.append([int(number) for number in worker.communicate()[0].split()])
        assert worker.returncode == 0
    assert [whole for _, whole in results] == [40, 40]
    assert sum(encoded for encoded, _ in results) == 40
    assert all(encoded for encoded, _ in results), "one of them did everything"


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    monkeypatch.setattr("clover.core.digests._SETTLED_NS", -1)
    memory = DigestMemory(tmp_path / "m.sqlite")
    first = memory.digest(path)
    memory.save()
    assert first == hashlib.sha256(b"one").hexdigest()

    def refuse(self: Path) -> bytes:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert DigestMemory(tmp_path / "m.sqlite").digest(path) == first
    path.write_bytes(b"two")
    assert DigestMemory(tmp_path / "m.sqlite").digest(path) == hashlib.sha256(b"two").hexdigest()
    # Where it cannot be written, files are read again; nothing else happens.
    (tmp_path / "file").write_bytes(b"")
    nowhere = DigestMemory(tmp_path / "file" / "m.sqlite")
    nowhere.digest(path)
    nowhere.save()
    (tmp_path / "m.sqlite").write_bytes(b"torn")
    torn = DigestMemory(tmp_path / "m.sqlite")
    assert torn.digest(path) == hashlib.sha256(b"two").hexdigest()
    torn.save()


def test_the_command_fills_with_workers_verifies_and_mends(tmp_path: Path) -> None:
    records = write_noise(tmp_path, 5)
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(json.dumps({**r.row(), "caption": "c"}) for r in records))
    tiny = ("kind=tiny", "image_size=32", "grid=4", "weights=null", "levels=[]")
    command = ["features", str(path), "--out", str(tmp_path / "c"), "--storage", "int8"]
    command += ["--views", "2"]
    command += [word for item in tiny for word in ("--set", f"encoder.{item}")]
    first = CliRunner().invoke(cli, [*command, "--workers", "2"])
    assert first.exit_code == 0, first.output
    assert "5 records on 5 images; tiny/patches, 16 tokens of 24" in first.output
    assert "-int8 (5 images, 2 views each)" in first.output
    shard = next((tmp_path / "c").rglob("shard-*.safetensors"))
    flip(shard)
    second = CliRunner().invoke(cli, [*command, "--verify"])
    assert second.exit_code == 0 and f"{shard} was damaged" in second.output
    assert "(5 images, 2 views each)" in second.output and shard.exists()


def test_killed_at_any_moment_the_same_call_ends_with_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clover.vision.cache._SHARD", 3)
    records = write_noise(tmp_path / "i", 24)
    paths = hash_images(records, tmp_path / "i")[1]
    digests = list(paths)
    whole = fill(tmp_path / "whole", Counting(), records, tmp_path / "i").get(digests)

    class Slow(Counting):
        def __init__(self) -> None:
            super().__init__(CONFIG.model_copy(update={"batch_size": 1}))

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            time.sleep(0.004)
            return super().encode(pixels)

    random = np.random.default_rng(3)
    killed = 0
    for _ in range(6):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                torch.set_num_threads(1)
                FeatureCache(tmp_path / "c", Slow()).fill(paths)
            os._exit(0)
        time.sleep(random.uniform(0.02, 0.1))
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert killed > 0
    encoder = Counting()
    cache = fill(tmp_path / "c", encoder, records, tmp_path / "i")
    assert torch.equal(cache.get(digests), whole) and cache.verify() == []
