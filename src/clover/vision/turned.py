"""One image, read from every side at once.

Glass has no right way up: a tissue turned by a quarter or mirrored is the same tissue, and a frozen
encoder says something else of it. The Q-Former reads a set of tokens of any number, so it may read
those of all turned copies together: the answer then hangs on the image alone, not on how it lay.

# Paper: encodes the image once. What this is worth is measured in docs/decisions/0012.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from clover.core.files import fingerprint
from clover.vision.encoder import ImageEncoder


class TurnedEncoder:
    """An encoder whose tokens are those of an image and its turned copies, one after another.

    Attributes:
        plain: The encoder itself.
        turns: Copies, the image as it is among them: 2 adds its mirror image, 4 the quarter
            turns, 8 both.
    """

    def __init__(self, plain: ImageEncoder, turns: int) -> None:
        self.plain, self.turns = plain, turns
        self.id = plain.id
        # Its tokens are others, and so is their place in a cache.
        self.revision, self.named_revision = (
            fingerprint([revision, "turned", turns])
            for revision in (plain.revision, plain.named_revision)
        )
        self.num_tokens = turns * plain.num_tokens
        self.width = plain.width
        self.licence, self.licence_note = plain.licence, plain.licence_note
        self.microns_per_pixel = plain.microns_per_pixel
        self.batch_size = plain.batch_size

    def prepare(self, image: Image.Image) -> Tensor:
        """Return one image as the network wants it [3, S, S]."""
        return self.plain.prepare(image)

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, turns * P, E], without gradient; the image as it is comes first."""
        return torch.cat(
            [self.plain.encode(turned(pixels, turn, self.turns)) for turn in range(self.turns)],
            dim=1,
        )


def turned(pixels: Tensor, turn: int, turns: int) -> Tensor:
    """Return images [..., S, S] in one of 1, 2, 4 or 8 positions; the first is as they are."""
    quarters, mirrored = (0, turn) if turns == 2 else (turn % 4, turn // 4)
    found = torch.rot90(pixels, quarters, dims=(-2, -1))
    return found.flip(-1) if mirrored else found


def places_of_turns(side: int, num_tokens: int, turns: int) -> Tensor:
    """Return which tokens show each place of the upright image, [turns, side * side].

    Args:
        side: Of the grid that one copy's tokens form.
        num_tokens: Of all copies; a class token stands before each copy's grid, or none.
        turns: Copies.
    """
    upright = torch.arange(side * side).view(side, side)
    each = num_tokens // turns
    found = torch.empty(turns, side * side, dtype=torch.long)
    for turn in range(turns):
        shown = turned(upright, turn, turns).flatten()  # the place that each token shows
        found[turn, shown] = torch.arange(side * side) + (turn + 1) * each - side * side
    return found


def num_turns(encoder: ImageEncoder) -> int:
    """Return how many copies of an image an encoder reads."""
    return encoder.turns if isinstance(encoder, TurnedEncoder) else 1


def plain_encoder(encoder: ImageEncoder) -> ImageEncoder:
    """Return what encodes an image once."""
    return encoder.plain if isinstance(encoder, TurnedEncoder) else encoder
