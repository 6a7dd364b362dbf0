"""Stage 1 as an objective for the loop: images and captions in, three losses out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clover.align.apart import backward_apart
from clover.align.cached import backward_in_chunks
from clover.align.losses import Everyone, LossSettings
from clover.core.config import AlignConfig
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import TextTokenizer, Tokens
from clover.training import processes
from clover.training.device import Device
from clover.training.objective import Losses
from clover.vision.dataset import FeatureSet


@dataclass
class AlignObjective:
    """Contrast, match and caption over pairs of image and caption."""

    module: Bridge
    data: FeatureSet
    tokenizer: TextTokenizer
    config: AlignConfig
    device: Device

    def num_samples(self) -> int:
        """Return the number of pairs."""
        return len(self.data.records)

    def sizes(self) -> None:
        """Batches are not sorted by length: negatives should be like any other pair."""

    def names(self, indices: Sequence[int]) -> list[str]:
        """Return the records' ids."""
        return [self.data.records[index].id for index in indices]

    def announce(self, indices: Sequence[int], draws: Sequence[int]) -> None:
        """Have these pairs' features read from the disk beside the steps before."""
        self.data.announce(indices, draws)

    def collate(self, indices: Sequence[int]) -> tuple[Tensor, Tokens]:
        """Return image tokens [B, P, E] and captions."""
        captions = [self.data.records[index].caption or "" for index in indices]
        tokens = self.tokenizer(captions, limit=self.config.max_text_tokens)
        where = self.device.device
        features = self.data.features(indices).to(where)
        return features, Tokens(tokens.ids.to(where), tokens.mask.to(where))

    def losses(self, batch: tuple[Tensor, Tokens]) -> Losses:
        """Return the summed losses of a batch, weighted by its pairs."""
        features, text = batch
        count = torch.tensor(float(len(features)), device=features.device)
        if self.config.gradient_chunk:
            backward = partial(backward_in_chunks, chunk=self.config.gradient_chunk)
        else:
            everyone = Everyone.gather(features, text) if processes.num_processes() > 1 else None
            backward = partial(backward_apart, everyone=everyone)
        found = backward(
            self.module,
            features,
            text,
            LossSettings(
                decode_start=self.tokenizer.decode_start,
                which=self.config.losses,
                label_smoothing=self.config.label_smoothing,
                detach_gathered=self.config.gather == "detached",
                ignore_duplicates=self.config.ignore_duplicates,
            ),
            scale=len(features),
        )
        # The gradients are in the weights already. The loop goes back through what it is given:
        # through this, nothing is added. Nor to the loss, unless similarities are not finite: then
        # it is not either, whichever losses were asked for.
        similar = found.similar.image_to_text.sum() + found.similar.text_to_image.sum()
        nothing = 0 * (self.module.alignment.temperature + similar)
        return Losses(found.total * count + nothing, count, found.parts)
