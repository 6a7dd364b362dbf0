"""How well stage 1 aligned: retrieval among held-out pairs, and telling right from wrong pairs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from clover.align.contrast import similarity
from clover.align.losses import match_logits
from clover.align.match import Negatives
from clover.core.config import AlignConfig
from clover.qformer.bridge import Bridge
from clover.qformer.model import ImageKeys
from clover.qformer.tokenizer import TextTokenizer, Tokens
from clover.training.device import Device
from clover.vision.dataset import FeatureSet

_BATCH = 32
_NUMBERS = 1 << 24
"""Similarities of queries that are held at a time: 64 MiB."""


@dataclass(frozen=True)
class RetrievalScores:
    """Percentages over `num_pairs` held-out pairs.

    A text that stands with several images counts as right for each of them.
    """

    num_pairs: int
    image_to_text_recall_1: float
    image_to_text_recall_5: float
    text_to_image_recall_1: float
    text_to_image_recall_5: float
    matching_accuracy: float
    """Own pairs told from pairs with the next image or the next text, whose texts differ."""

    def row(self) -> dict[str, float]:
        """Return the JSON-able form."""
        return asdict(self)


@torch.no_grad()
def evaluate_alignment(
    bridge: Bridge,
    data: FeatureSet,
    tokenizer: TextTokenizer,
    config: AlignConfig,
    device: Device,
) -> RetrievalScores:
    """Score retrieval and matching over all pairs of `data`."""
    captions = [record.caption or "" for record in data.records]
    text = tokenizer(captions, limit=config.max_text_tokens)
    text = Tokens(text.ids.to(device.device), text.mask.to(device.device))
    heads = bridge.alignment
    image_vectors, text_vectors, keys = [], [], []
    for start in range(0, len(captions), _BATCH):
        rows = range(start, min(start + _BATCH, len(captions)))
        part = slice(rows.start, rows.stop)
        image = bridge.read_image(data.features(rows).to(device.device))
        image_vectors.append(heads.embed_image(bridge.qformer.encode_queries(image).hidden))
        hidden = bridge.qformer.encode_text(text.ids[part], text.mask[part], first_row=True)
        text_vectors.append(heads.embed_text(hidden[:, 0]))
        keys.append(_accuracy(bridge, image, Tokens(text.ids[part], text.mask[part])))
    images, texts = torch.cat(image_vectors), torch.cat(text_vectors)
    found = _found(images, texts, heads.temperature, captions).mean(dim=1) * 100
    right, asked = (sum(item[place] for item in keys) for place in (0, 1))
    shares = [*found.tolist(), 100 * right / max(1, asked)]
    return RetrievalScores(len(captions), *(round(share, 2) for share in shares))


def _found(images: Tensor, texts: Tensor, temperature: Tensor, captions: list[str]) -> Tensor:
    """Return whether each pair is found [4, N]: image to text at 1 and at 5, text to image alike.

    A block of rows at a time: similarities of all with all would take N * N * Q numbers.
    """
    numbers: dict[str, int] = {}
    said = torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions])
    rows = max(1, _NUMBERS // (len(images) * images.shape[1]))
    blocks = []
    for start in range(0, len(images), rows):
        part = slice(start, start + rows)
        similar = similarity(
            images[part], texts[part], temperature, all_image=images, all_text=texts
        )
        blocks.append(
            [
                (said[_top(matrix, k)] == said[part, None]).any(dim=1).float()
                for matrix in (similar.image_to_text, similar.text_to_image)
                for k in (1, 5)
            ]
        )
    return torch.stack([torch.cat(kind) for kind in zip(*blocks, strict=True)])


def _top(matrix: Tensor, k: int) -> Tensor:
    return matrix.cpu().topk(min(k, matrix.shape[1]), dim=1).indices


def _accuracy(bridge: Bridge, image: ImageKeys, text: Tokens) -> tuple[int, int]:
    """Return (right, asked) over own pairs and both kinds of neighbouring wrong pairs."""
    size = len(text.ids)
    following = torch.arange(size, device=text.ids.device).roll(-1)
    differs = (text.ids != text.ids[following]).any(dim=1)
    logits = match_logits(bridge, image, text, Negatives(following, following))
    said = logits.argmax(dim=1).view(3, size)
    right = int((said[0] == 1).sum() + ((said[1:] == 0) & differs).sum())
    return right, size + 2 * int(differs.sum())
