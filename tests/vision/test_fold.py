"""A folded network computes what it computed before, and folds no more than it may."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from clover.core.config import EncoderConfig
from clover.vision.encoder import FeatureMapEncoder
from clover.vision.fold import drop_unread_stages, fold_batch_norms


def lively(network: nn.Module) -> nn.Module:
    """Give batch norms statistics and scales other than 0 and 1, so that folding them shows."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias):
                assert values is not None
                values.data.copy_(0.3 * torch.randn(values.shape, generator=generator))
            for values in (module.running_var, module.weight):
                assert values is not None
                values.data.copy_(0.5 + torch.rand(values.shape, generator=generator))
    return network.eval().requires_grad_(False)


def pixels(size: int = 64, count: int = 1) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("model", ["tf_efficientnet_lite0", "resnet18"])
def test_a_folded_network_gives_the_same_maps_and_has_no_batch_norm(model: str) -> None:
    torch.manual_seed(0)
    network = lively(timm.create_model(model, features_only=True, out_indices=(2, 3)))
    before = network(pixels(count=2))
    folded = fold_batch_norms(network, pixels())
    assert norms(network) > 0 and norms(folded) == 0
    for ours, theirs in zip(folded(pixels(count=2)), before, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())
    for ours, theirs in zip(network(pixels(count=2)), before, strict=True):
        assert torch.equal(ours, theirs), "the given network was changed"


@pytest.mark.parametrize("levels", [(2, 3), (3, 2), (1,)])
def test_every_level_that_is_read_is_kept_whatever_their_order(levels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = lively(
        timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=levels)
    )
    before, stages = network(pixels()), len(network.blocks)  # type: ignore[arg-type]
    drop_unread_stages(network)
    assert len(network.blocks) < stages  # type: ignore[arg-type]
    found = network(pixels())
    assert len(found) == len(levels)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, before, strict=True))


class ReadTwice(nn.Module):
    """The convolution's own output is read too: a fold would change it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = self.convolution(x)
        return [found + self.norm(found)]


class UsedTwice(nn.Module):
    """One convolution before two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.second(self.convolution(self.first(self.convolution(x))))]


@pytest.mark.parametrize("make", [ReadTwice, UsedTwice])
def test_a_network_that_cannot_be_folded_is_left_alone(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = lively(make())
    assert fold_batch_norms(network, pixels()) is network


def test_stages_behind_the_last_level_are_dropped_and_change_nothing() -> None:
    torch.manual_seed(0)
    network = lively(
        timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3))
    )
    before, size = network(pixels()), sum(item.numel() for item in network.parameters())
    drop_unread_stages(network)
    assert sum(item.numel() for item in network.parameters()) < size / 2
    for ours, theirs in zip(network(pixels()), before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("levels", [(2, 3), (3,), (0, 1), ()])
def test_the_encoders_tokens_are_the_unfolded_networks(levels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder = FeatureMapEncoder(EncoderConfig(image_size=64, grid=4, levels=levels))
    torch.manual_seed(0)
    chosen = {"out_indices": levels} if levels else {}
    network = timm.create_model("tf_efficientnet_lite0", features_only=True, **chosen).eval()
    images = pixels(count=19)  # more than one pass takes, and not a multiple of it
    with torch.no_grad():
        expected = torch.cat([encoder._fold(found) for found in network(images)], dim=-1)
    torch.testing.assert_close(encoder.encode(images), expected, atol=1e-4, rtol=1e-4)
