"""The words that visual tokens are trained to be, and how a token between two of them is read.

A bridge that has learnt to spell (`clover.tune.grounding`) writes words of the language model where
it looks for the image. On an image it is unsure of, a visual token lies between two words, where a
small language model has never read anything: it answers worse than the token spells.

# Paper: has neither; nothing here is used unless the recipe asks for it (docs/decisions/0012).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clover.language.protocol import LanguageModel


@dataclass(frozen=True)
class Words:
    """Some of a language model's words.

    Attributes:
        ids: Their tokens [V'].
        embeddings: As the language model reads them, float32 [V', H].
        mean: Of all the language model's words [H].
    """

    ids: Tensor
    embeddings: Tensor
    mean: Tensor

    @classmethod
    def of(cls, language: LanguageModel, ids: Sequence[int], device: torch.device) -> Words:
        """Look these token ids up."""
        tokens = torch.tensor(list(ids), dtype=torch.long, device=device)
        mean, _ = language.embedding_statistics()
        return cls(tokens.cpu(), language.word_embeddings(tokens).float(), mean.to(device))

    def scores(self, visual: Tensor) -> Tensor:
        """Return how much visual tokens [B, Q, H] point at each word [B, Q, V'], float32.

        The product of both as seen from the mean word: what all words share says nothing.
        """
        with torch.autocast(visual.device.type, enabled=False):
            return (visual.float() - self.mean) @ (self.embeddings - self.mean).t()

    def pulled(self, visual: Tensor, share: float) -> Tensor:
        """Return visual tokens [B, Q, H] moved by this share of the way to the word they point at.

        Args:
            visual: What the bridge gives.
            share: 0 leaves them where they are, 1 puts the word itself in their place.
        """
        nearest = self.embeddings[self.scores(visual).argmax(dim=-1)]  # [B, Q, H]
        return torch.lerp(visual.float(), nearest, share).to(visual.dtype)
