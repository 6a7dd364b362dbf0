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
        spellings: Each answer that was learnt as its words, by their places among these [A, Q];
            None where words are taken one by one.
    """

    ids: Tensor
    embeddings: Tensor
    mean: Tensor
    spellings: Tensor | None = None

    @classmethod
    def of(
        cls,
        language: LanguageModel,
        ids: Sequence[int],
        device: torch.device,
        spellings: Sequence[Sequence[int]] | None = None,
    ) -> Words:
        """Look these token ids up."""
        tokens = torch.tensor(list(ids), dtype=torch.long, device=device)
        mean, _ = language.embedding_statistics()
        spelt = torch.tensor(spellings, dtype=torch.long, device=device) if spellings else None
        return cls(tokens.cpu(), language.word_embeddings(tokens).float(), mean.to(device), spelt)

    def scores(self, visual: Tensor) -> Tensor:
        """Return how much visual tokens [B, Q, H] point at each word [B, Q, V'], float32.

        The product of both as seen from the mean word: what all words share says nothing.
        """
        with torch.autocast(visual.device.type, enabled=False):
            return (visual.float() - self.mean) @ (self.embeddings - self.mean).t()

    def pulled(self, visual: Tensor, share: float) -> Tensor:
        """Return visual tokens [B, Q, H] moved by this share of the way to the words they point at.

        Those of the likeliest spelling of all their places together: word by word, an image
        between two answers would be read as words of both, an answer that nobody ever gave.

        Args:
            visual: What the bridge gives.
            share: 0 leaves them where they are, 1 puts the words themselves in their place.
        """
        scores = self.scores(visual)  # [B, Q, V']
        if self.spellings is None:
            places = scores.argmax(dim=-1)
        else:
            columns = self.spellings.t().expand(len(scores), -1, -1)  # [B, Q, A]
            likely = scores.log_softmax(dim=-1).gather(2, columns).sum(dim=1)  # [B, A]
            places = self.spellings[likely.argmax(dim=1)]
        nearest = self.embeddings[places]  # [B, Q, H]
        return torch.lerp(visual.float(), nearest, share).to(visual.dtype)
