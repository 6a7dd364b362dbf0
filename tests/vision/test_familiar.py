"""Familiarity: the distance is Mahalanobis's, its shares hold for new images, and it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clover.cli import main
from clover.core.errors import CloverError
from clover.model import Clover, load
from clover.vision import familiar
from clover.vision.dataset import FeatureSet, load_feature_set
from clover.vision.encoder import load_encoder
from clover.vision.familiar import Familiarity, describe, pool
from tiny import QUESTION, Tiny, tiny_clover, write_chessboard, write_data


def drawn(count: int, *, seed: int) -> torch.Tensor:
    """Return rows [count, 12] of one lopsided normal distribution."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.randn(count, 12, generator=random, dtype=torch.float64) @ mix + 3


def naive_distance(train: torch.Tensor, rows: torch.Tensor, kept: int) -> torch.Tensor:
    """Return Mahalanobis's distance under probabilistic PCA's covariance, written out."""
    mean, scale = train.mean(dim=0), train.std(dim=0)
    standard = (train - mean) / scale
    values, vectors = torch.linalg.eigh(standard.T @ standard / len(train))
    values, vectors = values.flip(0), vectors.flip(1)
    values[kept:] = values[kept:].mean()
    covariance = vectors @ torch.diag(values) @ vectors.T
    offset = (rows - mean) / scale
    return (offset @ torch.linalg.inv(covariance) * offset).sum(dim=1)


def test_the_distance_is_that_of_the_distribution_without_the_rows_own_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(familiar, "_COMPONENTS", 4)
    rows = drawn(80, seed=0)
    groups = [f"g{index // 4:02d}" for index in range(80)]
    fitted = Familiarity.fit(rows, groups)
    assert fitted is not None
    other = drawn(30, seed=5) * 1.5
    torch.testing.assert_close(fitted.distance(other), naive_distance(rows, other, 4))
    held_out = []
    for fold in range(5):
        inside = torch.tensor([index // 4 % 5 == fold for index in range(80)])
        held_out.append(naive_distance(rows[~inside], rows[inside], 4))
    torch.testing.assert_close(fitted.distances, torch.cat(held_out).sort().values.float())


def test_new_images_are_farther_than_a_share_as_often_as_it_says() -> None:
    fitted = Familiarity.fit(drawn(600, seed=0), [str(index) for index in range(600)])
    assert fitted is not None
    new = torch.searchsorted(fitted.distances.double(), fitted.distance(drawn(2000, seed=9)))
    shares = new / len(fitted.distances)
    for share in (0.5, 0.9):
        assert abs(float((shares > share).float().mean()) - (1 - share)) < 0.06
    far = torch.searchsorted(fitted.distances.double(), fitted.distance(drawn(50, seed=9) + 40))
    assert bool((far == len(fitted.distances)).all())


def test_few_images_or_groups_say_too_little() -> None:
    assert Familiarity.fit(drawn(49, seed=0), [str(index) for index in range(49)]) is None
    assert Familiarity.fit(drawn(80, seed=0), [str(index % 4) for index in range(80)]) is None


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    fitted = Familiarity.fit(drawn(60, seed=0), [str(index) for index in range(60)])
    assert fitted is not None
    path = tmp_path / "familiarity.safetensors"
    fitted.save(path)
    again = Familiarity.load(path)
    torch.testing.assert_close(
        again.distance(drawn(3, seed=1)), fitted.distance(drawn(3, seed=1)).float(), rtol=1e-3,
        atol=1e-3,
    )  # fmt: skip
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CloverError, match="not a whole familiarity file"):
        Familiarity.load(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Clover:
    """Return a tiny model that knows 60 images like the tiny data's."""
    folder = tmp_path_factory.mktemp("familiar")
    captions, _ = write_data(folder, images=60)
    encoder = load_encoder(tiny.recipe.encoder)
    data = load_feature_set(captions, needs="caption", encoder=encoder, cache=folder / "cache")
    model = tiny_clover(tiny.recipe)
    model.familiarity = describe(data)
    return model


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a chessboard: no tiny image is like it."""
    return write_chessboard(tmp_path_factory.mktemp("strange") / "board.png")


def test_a_model_says_so_of_a_strange_image_alone(
    model: Clover, strange: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model.save(tmp_path / "model")
    loaded = load(folder)
    assert loaded.ask(tiny.image(), QUESTION).note is None
    note = loaded.ask(strange, QUESTION).note
    assert note is not None and "farther from them than any of their own" in note
    for image, expected in ((strange, note), (tiny.image(), None)):
        with pytest.raises(SystemExit):
            main(["ask", str(folder), str(image), QUESTION, "--json"])
        assert json.loads(capsys.readouterr().out).get("note") == expected
    with pytest.raises(SystemExit):
        main(["ask", str(folder), str(strange), QUESTION])
    captured = capsys.readouterr()
    assert note in captured.err and note not in captured.out
    loaded.familiarity = None
    loaded.save(folder)
    assert load(folder).familiarity is None, "an earlier model's file must not stay"


def test_describing_reads_every_image_once_and_at_most_so_many(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, questions = write_data(tmp_path, images=60)
    encoder = load_encoder(tiny.recipe.encoder)
    data: FeatureSet = load_feature_set(
        questions, needs="question", encoder=encoder, cache=tmp_path / "cache"
    )
    whole = describe(data)
    assert len(data.records) == 120 and whole is not None and len(whole.distances) == 60
    rows = pool(data.cache.get(sorted(set(data.digests))))
    torch.testing.assert_close(whole.mean.float(), rows.mean(dim=0))
    monkeypatch.setattr(familiar, "_MOST", 55)
    part = describe(data)
    assert part is not None and len(part.distances) == 55
