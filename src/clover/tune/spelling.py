"""How visual tokens spell an answer: its own tokens, or as many as tell it from the others.

In: the answers of the training data. Out: token ids for each answer that is short enough.

Spelt whole, an answer of four tokens can contradict itself: every place is predicted by itself, and
an uncertain bridge writes "lung squamousocarcinoma". Spelt as far as it differs from every other
answer ("lung squamous", "lung aden"), it cannot; the language model completes it, as its worked
examples show. Measured in docs/decisions/0008.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from clover.core.errors import CloverError

SpellingKind = Literal["whole", "shortest"]
Encode = Callable[[str], list[int]]
"""From text to the language model's tokens, nothing added."""

_LONGEST_TOKEN = 20
"""Characters; an answer of more for each place is not tokenised to find that it is too long."""


@dataclass(frozen=True)
class Spelling:
    """What stands for each answer.

    Attributes:
        ids: Token ids of each answer that fits, fillers left out.
        num_places: Visual tokens there are.
        filler: Text behind an answer; one token.
        filler_id: Its id.
    """

    ids: dict[str, list[int]]
    num_places: int
    filler: str
    filler_id: int
    encode: Encode

    @classmethod
    def of(
        cls,
        answers: Iterable[str],
        *,
        encode: Encode,
        num_places: int,
        filler: str,
        kind: SpellingKind = "whole",
    ) -> Spelling:
        """Spell every answer that has no more tokens than there are places.

        Raises:
            CloverError: the filler is not one token.
        """
        filler_ids = encode(filler)
        if len(filler_ids) != 1:
            raise CloverError(
                f"tune.grounding_filler {filler!r} is {len(filler_ids)} tokens of the language "
                "model, it must be one; ' -' is one in most"
            )
        longest = _LONGEST_TOKEN * num_places
        ids = {}
        for answer in set(answers):
            if answer and len(answer) <= longest:
                # With a blank before it: the commonest form of a word, and often a single token.
                found = encode(" " + answer)
                if len(found) <= num_places:
                    ids[answer] = found
        if kind == "shortest":
            ids = _cut(ids)
        return cls(ids, num_places, filler, filler_ids[0], encode)

    def text(self, answer: str) -> str | None:
        """Return an answer as text that is tokenised as it is spelt, filled up; None if too long.

        Also None where its beginning alone would be other tokens.
        """
        ids = self.ids.get(answer)
        if ids is None:
            return None
        ends = range(1, len(answer) + 1)
        part = next((answer[:end] for end in ends if self.encode(" " + answer[:end]) == ids), None)
        if part is None:
            return None
        return f" {part}{self.filler * (self.num_places - len(ids))}"


def _cut(ids: dict[str, list[int]]) -> dict[str, list[int]]:
    """Keep each answer's tokens up to the first that no other answer shares."""
    beginnings = Counter(
        tuple(tokens[:end])
        # Two writings of the same tokens are one answer.
        for tokens in {tuple(tokens) for tokens in ids.values()}
        for end in range(1, len(tokens) + 1)
    )
    return {
        answer: next(
            (
                tokens[:end]
                for end in range(1, len(tokens) + 1)
                if beginnings[tuple(tokens[:end])] == 1
            ),
            tokens,
        )
        for answer, tokens in ids.items()
    }
