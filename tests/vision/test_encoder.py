"""Image encoders: tokens in reading order, nothing averaged away, frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.nn import functional as F

from clover.core.config import EncoderConfig, load_recipe
from clover.core.errors import CloverError
from clover.vision.encoder import FeatureMapEncoder, TinyEncoder, load_encoder, unloaded_encoder

LITE = EncoderConfig(image_size=64, grid=4, levels=(2, 3))


@pytest.fixture(scope="module")
def lite() -> FeatureMapEncoder:
    torch.manual_seed(0)
    return FeatureMapEncoder(LITE)


def test_folding_a_finer_level_keeps_every_value_at_its_place(lite: FeatureMapEncoder) -> None:
    # Each cell of an 8 x 8 map says where it is; the grid is 4 x 4.
    level = torch.arange(64.0).view(1, 1, 8, 8)
    tokens = lite._fold(level)
    assert tokens.shape == (1, 16, 4)
    for place in range(16):
        row, column = divmod(place, 4)
        block = level[0, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
        expected = F.layer_norm(block, (4,))
        torch.testing.assert_close(tokens[0, place], expected)


def test_a_coarser_level_is_repeated_under_its_own_place(lite: FeatureMapEncoder) -> None:
    level = torch.randn(1, 5, 2, 2)
    tokens = lite._fold(level).view(4, 4, 5)
    for row in range(4):
        for column in range(4):
            expected = F.layer_norm(level[0, :, row // 2, column // 2], (5,))
            torch.testing.assert_close(tokens[row, column], expected)


def test_a_change_in_one_corner_changes_that_corners_token_most() -> None:
    encoder = TinyEncoder(EncoderConfig(kind="tiny", image_size=32, grid=4))
    image = Image.new("RGB", (32, 32), "white")
    changed = image.copy()
    changed.paste("black", (24, 0, 32, 8))
    before, after = (encoder.encode(encoder.prepare(item)[None])[0] for item in (image, changed))
    moved = (before - after).abs().sum(dim=1)
    assert moved.nonzero().flatten().tolist() == [3]


def test_width_and_number_of_tokens_are_what_encode_returns(lite: FeatureMapEncoder) -> None:
    pixels = torch.stack([lite.prepare(Image.new(mode, (50, 90))) for mode in ("RGBA", "L", "P")])
    assert pixels.shape == (3, 3, 64, 64)
    tokens = lite.encode(pixels)
    assert tokens.shape == (3, lite.num_tokens, lite.width) and not tokens.requires_grad
    alone = torch.cat([lite.encode(item[None]) for item in pixels])
    torch.testing.assert_close(tokens, alone, atol=1e-4, rtol=1e-4)


def test_nothing_of_the_encoder_learns_or_drops(lite: FeatureMapEncoder) -> None:
    assert not lite.network.training
    assert not any(item.requires_grad for item in lite.network.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "tf_efficientnet_lite9"}, "did you mean 'tf_efficientnet_lite"),
        ({"levels": (7,)}, "fewer feature levels"),
        ({"grid": 3}, "encoder.grid 3"),
        ({"weights": "/nowhere.pth"}, "no file /nowhere.pth"),
    ],
)
def test_an_encoder_that_cannot_be_is_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(CloverError) as error:
        load_encoder(LITE.model_copy(update=changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_of_another_network_is_one_line(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("weights") / "other.pth"
    torch.save({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, path)
    with pytest.raises(CloverError, match="does not fit tf_efficientnet_lite0: tensor"):
        load_encoder(LITE.model_copy(update={"weights": str(path)}))


def test_another_pickle_than_tensors_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("weights") / "bad.pth"
    path.write_bytes(b"\x80\x04not a checkpoint")
    with pytest.raises(CloverError, match="cannot be read as weights"):
        load_encoder(LITE.model_copy(update={"weights": str(path)}))


@pytest.mark.parametrize("kind", ["timm", "tiny"])
@pytest.mark.parametrize(
    "setting",
    [
        {"numbers": "int8"},
        {"numbers": "bfloat16"},
        {"mean": (0.0, 0.0, 0.0)},
        {"std": (1.0, 1.0, 1.0)},
        {"options": {"depth": 2}},
    ],
)
def test_a_setting_that_the_kind_does_not_read_is_refused(
    kind: str, setting: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=f"kind {kind} does not read {next(iter(setting))}"):
        EncoderConfig.model_validate({"kind": kind, **setting})
    EncoderConfig.model_validate({"kind": "timm_tokens", **setting})


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_standard_deviation_that_gives_no_numbers_is_refused(value: float) -> None:
    for std in ([value] * 3, [1.0, value, 1.0]):
        with pytest.raises(ValidationError, match=r"greater than 0|finite"):
            EncoderConfig.model_validate({"kind": "timm_tokens", "std": std})
    with pytest.raises(CloverError, match=r"encoder\.std.*greater than 0"):
        load_recipe("phantom", ("encoder.kind=timm_tokens", "encoder.std=[0,0,0]"))


def test_random_weights_are_said_and_a_known_encoder_without_weights_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    load_encoder(EncoderConfig(kind="tiny", image_size=32, grid=4))
    unloaded_encoder(LITE)
    assert not caplog.records
    load_encoder(LITE)
    load_encoder(EncoderConfig(kind="eva_clip", model="vit_tiny_14", image_size=56))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "the weights of vit_tiny_14 are random" in said[1]
    with pytest.raises(CloverError, match=r"no weights of encoder\.model 'eva-clip-g'; name them"):
        load_encoder(EncoderConfig(kind="known", model="eva-clip-g"))
