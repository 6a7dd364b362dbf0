"""What stage 1 alone can do: caption, match, compare and describe in numbers (BLIP-2's abilities).

No language model is needed. Research use only, not for diagnosis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clover.core.errors import CloverError
from clover.qformer.bridge import Bridge
from clover.qformer.caption import CaptionSettings, write_caption
from clover.qformer.tokenizer import TextTokenizer, Tokens


def check_texts(texts: Iterable[str], name: str) -> list[str]:
    """Return texts as a list.

    Args:
        texts: One or more.
        name: Of the argument, for the message.

    Raises:
        CloverError: one text alone, whose letters would be taken for texts; none; or no texts.
    """
    if isinstance(texts, str):
        raise CloverError(f"{name} is one text, {texts!r}; give a list: [{texts!r}]")
    found = list(texts) if isinstance(texts, Iterable) else []
    if not found or not all(isinstance(text, str) for text in found):
        raise CloverError(f"{name} is {texts!r}; give a list of texts, for instance ['liver']")
    return found


@dataclass(frozen=True)
class Aligned:
    """A bridge with stage 1's heads.

    Attributes:
        bridge: In evaluation mode.
        tokenizer: Of the Q-Former.
        max_text_tokens: Longest text; a longer one loses its end.
    """

    bridge: Bridge
    tokenizer: TextTokenizer
    max_text_tokens: int = 32

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """Return texts as the bridge reads them.

        Raises:
            CloverError: one is empty, or it is one text alone that is not in a list.
        """
        texts = check_texts(texts, "texts")
        if not all(text.strip() for text in texts):
            raise CloverError("a text is empty; give for instance 'colon adenocarcinoma'")
        found = self.tokenizer(texts, limit=self.max_text_tokens)
        device = self.bridge.vision_norm.weight.device
        return Tokens(found.ids.to(device), found.mask.to(device))

    @torch.no_grad()
    def caption(self, features: Tensor, settings: CaptionSettings | None = None) -> str:
        """Describe an image [1, P, E] with the next-word head."""
        image = self.bridge.read_image(features.to(self.bridge.vision_norm.weight.device))
        ids = write_caption(
            self.bridge,
            self.bridge.qformer.encode_queries(image).cache,
            start=self.tokenizer.decode_start,
            end=self.tokenizer.end,
            settings=settings,
        )
        return self.tokenizer.decode(ids)

    @torch.no_grad()
    def match(self, features: Tensor, texts: Sequence[str]) -> list[float]:
        """Return the probability that each text belongs to the image [1, P, E]."""
        text = self.tokens(texts)
        image = self.bridge.read_image(features.to(text.ids.device))
        hidden = self.bridge.qformer.encode_pair(image, text.ids, text.mask, queries_only=True)
        scores: list[float] = self.bridge.alignment.match(hidden).softmax(dim=1)[:, 1].tolist()
        return scores

    def image_vectors(self, features: Tensor) -> Tensor:
        """Return unit vectors [B, Q, C] of images [B, P, E]."""
        with torch.no_grad():
            image = self.bridge.read_image(features.to(self.bridge.vision_norm.weight.device))
            return self.bridge.alignment.embed_image(
                self.bridge.qformer.encode_queries(image).hidden
            )

    def text_vectors(self, text: Tokens) -> Tensor:
        """Return unit vectors [B, C] of texts, from `tokens`."""
        with torch.no_grad():
            hidden = self.bridge.qformer.encode_text(text.ids, text.mask, first_row=True)
            return self.bridge.alignment.embed_text(hidden[:, 0])

    def similarity(self, features: Tensor, texts: Sequence[str]) -> Tensor:
        """Return cosines [B, N] of images [B, P, E] and N texts; an image's best query counts."""
        cosines = torch.einsum(
            "bqc,nc->bnq", self.image_vectors(features), self.text_vectors(self.tokens(texts))
        )
        return cosines.amax(dim=2)
