"""The table of hashes against a dictionary."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest

from clover.core.digests import DigestMemory
from clover.core.record import Record
from clover.vision import places
from clover.vision.hashes import Digests, ImageHashes, ImagePaths
from clover.vision.places import Places, digest_array, make_keys


def sha(number: int) -> bytes:
    # A hash that ends in zeros is one as good as any other.
    return hashlib.sha256(str(number).encode()).digest()[: 32 - number % 3] + bytes(number % 3)


def test_it_finds_what_a_dictionary_finds_through_additions_and_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "_SMALL", 40)
    draw = random.Random(0)
    table, expected = Places(), dict[tuple[int, int], tuple[int, int]]()
    for shard in range(30):
        view = draw.choice([0, 0, 1, 300])
        numbers = [shard * 10 + row for row in range(draw.randint(0, 10))]
        rows = np.arange(len(numbers), dtype=np.int32)
        table.add(shard, make_keys(digest_array(map(sha, numbers)), view), rows)
        expected |= {(number, view): (shard, row) for row, number in enumerate(numbers)}
        if shard % 7 == 6:
            lost = draw.randrange(shard)
            table.drop(lost)
            expected = {key: place for key, place in expected.items() if place[0] != lost}
        for view in (0, 1, 300):
            asked = draw.sample(range(300), 300)
            shards, rows = table.find(make_keys(digest_array(map(sha, asked)), view))
            found = {
                (number, view): (int(at), int(row))
                for number, at, row in zip(asked, shards, rows, strict=True)
                if at >= 0
            }
            assert found == {key: place for key, place in expected.items() if key[1] == view}
            assert table.count(view=view) == len(found)


def test_hashes_that_begin_alike_are_told_apart() -> None:
    draw = random.Random(0)
    digests = [b"alike..." + bytes([draw.randrange(4)]) * 24 for _ in range(60)]
    digests += [sha(number) for number in range(5)]
    table, expected = Places(), dict[tuple[bytes, int], tuple[int, int]]()
    for shard, (view, part) in enumerate([(0, digests), (2, digests[:20]), (1, digests[40:])]):
        table.add(shard, make_keys(digest_array(part), view), np.arange(len(part), dtype=np.int32))
        for row, digest in enumerate(part):
            expected.setdefault((digest, view), (shard, row))  # of two places the first
    for view in range(4):
        asked = [*digests, sha(99), b"alike..." + bytes(24)]
        found = zip(*table.find(make_keys(digest_array(asked), view)), strict=True)
        wanted = [expected.get((digest, view), (-1, 0)) for digest in asked]
        assert [(int(shard), int(row)) for shard, row in found] == wanted
    for part in ([], digests[:1], digests, digests[60:], digests * 2):
        assert Digests(digest_array(part)).num_distinct() == len(set(part))


def test_an_image_in_two_shards_counts_once() -> None:
    table = Places()
    for shard in range(2):
        table.add(shard, make_keys(digest_array([sha(0), sha(1)])), np.arange(2, dtype=np.int32))
    assert table.count(view=0) == 2
    table.drop(0)
    assert table.find(make_keys(digest_array([sha(1)])))[0].tolist() == [1]


@pytest.mark.parametrize("is_remembered", [False, True])
def test_hashes_are_those_of_the_bytes_and_paths_lead_back_to_the_first_name(
    is_remembered: bool, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    for name, content in {"a": b"1", "b": b"2", "c": b"1", "d.e": b"3"}.items():
        (tmp_path / name).write_bytes(content)
    names = ["b", "a", None, "gone", "c", "x/../a", "b", "gone", "d.e", "a#b"]
    memory = DigestMemory(tmp_path / "memory.sqlite") if is_remembered else None
    plain = ImageHashes(tmp_path, memory=memory)
    plain.add(["d.e", "x/../b", "a"])  # all there, each once
    assert list(Digests(plain.values()[0])) == [
        hashlib.sha256(text).hexdigest() for text in (b"3", b"2", b"1")
    ]
    hashes = ImageHashes(tmp_path, memory=memory)
    hashes.add(names[:5])
    hashes.add(names[5:])
    values, is_there = hashes.values()
    digests = [hashlib.sha256(text).hexdigest() for text in (b"2", b"1", b"1", b"1", b"2", b"3")]
    assert is_there.tolist() == [True, True, False, False, True, True, True, False, True, False]
    assert list(Digests(values[is_there])) == digests
    assert Digests(values[is_there]).num_distinct() == 3
    assert [(Path(item.source).name, item.reason) for item in hashes.rejected][:1] == [
        ("gone", "missing image")
    ]
    assert len(hashes.rejected) == 2 and "region" in hashes.rejected[1].reason
    kept = [name for name, there in zip(names, is_there, strict=True) if there]
    records = [Record(id=str(index), image=name) for index, name in enumerate(kept)]
    paths = ImagePaths(records, values[is_there], tmp_path)
    assert list(paths.items()) == [
        (digests[0], tmp_path / "b"),
        (digests[1], tmp_path / "a"),
        (digests[5], tmp_path / "d.e"),
    ]
    assert "0" * 64 not in paths and len(paths) == 3
