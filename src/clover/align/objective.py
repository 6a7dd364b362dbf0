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
from clover.qformer.tokenizer import WIDTHS, TextTokenizer, Tokens
from clover.training import processes
from clover.training.device import Device
from clover.training.objective import Losses
from clover.training.replay import Function, Replay, is_on_one_gpu
from clover.vision.dataset import FeatureSet

_SIMILAR = "similar"


@dataclass
class AlignObjective:
    """Contrast, match and caption over pairs of image and caption."""

    module: Bridge
    data: FeatureSet
    tokenizer: TextTokenizer
    config: AlignConfig
    device: Device

    def __post_init__(self) -> None:
        self.data.send_to(self.device.device)
        if self.config.compile:
            self.module.qformer.compile_layers()
        self._run: Function = Replay(self._losses) if self.is_replayed else self._losses

    @property
    def is_replayed(self) -> bool:
        """Whether steps are recorded and replayed: on one GPU, if nothing waits for it."""
        return (
            self.config.cuda_graphs
            and is_on_one_gpu(self.device)
            and not self.config.gradient_chunk
            and not self.module.config.checkpoint_activations
        )

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
        limit = self.config.max_text_tokens
        multiple = WIDTHS if self.device.device.type == "cuda" else 1
        if self.config.compile:  # each width for minutes
            multiple = limit
        tokens = self.tokenizer(captions, limit=limit, multiple=multiple)
        features = self.device.put(self.data.features(indices))
        return features, Tokens(self.device.put(tokens.ids), self.device.put(tokens.mask))

    def losses(self, batch: tuple[Tensor, Tokens]) -> Losses:
        """Return the summed losses of a batch, weighted by its pairs."""
        features, text = batch
        count = torch.full((), float(len(features)), device=features.device)
        parts = self._run(features, text.ids, text.mask)
        # Nothing is added to the loss, unless similarities are not finite: then it is not either,
        # whichever losses were asked for.
        nothing = 0 * parts.pop(_SIMILAR)
        total = torch.stack(list(parts.values())).sum() * count + nothing
        return Losses(total, count, parts, is_backward_done=True)

    def _losses(self, features: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Go forward and backward; return each loss, and the sum of all similarities."""
        text = Tokens(ids, mask)
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
        similar = found.similar.image_to_text.sum() + found.similar.text_to_image.sum()
        return {**found.parts, _SIMILAR: similar}
