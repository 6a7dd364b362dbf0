"""How answers are written: named settings, so that two predictions files can be compared.

`paper` is what the published system was evaluated with: beams of 5, at least 5 and at most 40
tokens, for closed questions as well, and the penalties of its code (SPEC, 4.3). `sense` writes
greedily, and gives a closed question the likelier of yes and no. `recipe` is what the model's
recipe says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from clover.core.config import EvaluateConfig
from clover.core.errors import CloverError, nearest
from clover.core.record import Record
from clover.language.protocol import GenerationSettings

YES_NO = ("yes", "no")
NAMES = ("recipe", "paper", "sense")


@dataclass(frozen=True)
class Decoding:
    """A name, and what it stands for."""

    name: str
    settings: GenerationSettings
    chooses_yes_no: bool = False
    """Whether a closed question is answered with the likelier of yes and no."""

    def choices(self, record: Record) -> tuple[str, ...] | None:
        """Return the answers a record's question may be given; None for any."""
        return YES_NO if self.chooses_yes_no and record.answer_type == "closed" else None

    def row(self) -> dict[str, Any]:
        """Return the JSON-able form, for the header of a predictions file."""
        return {
            "name": self.name,
            **asdict(self.settings),
            "closed": list(YES_NO) if self.chooses_yes_no else None,
        }


def find_decoding(
    name: str | None, config: EvaluateConfig, *, is_encoder_decoder: bool = False
) -> Decoding:
    """Return a named decoding.

    Args:
        name: `recipe`, `paper` or `sense`; `config.decoding` when absent.
        config: What `recipe` stands for.
        is_encoder_decoder: Of which kind the language model is; `paper` prefers short answers of
            the one more than of the other.

    Raises:
        CloverError: an unknown name.
    """
    name = name or config.decoding
    if name == "paper":
        settings = GenerationSettings(
            num_beams=5,
            min_tokens=5,
            max_tokens=40,
            repetition_penalty=1.5,
            length_penalty=-1.0 if is_encoder_decoder else 0.0,
        )
        return Decoding(name, settings)
    settings = GenerationSettings(max_tokens=config.max_tokens)
    if name == "sense":
        return Decoding(name, settings, chooses_yes_no=True)
    if name == "recipe":
        given = GenerationSettings(
            num_beams=config.num_beams, min_tokens=config.min_tokens, max_tokens=config.max_tokens
        )
        return Decoding(name, given)
    raise CloverError(f"no decoding '{name}'{nearest(name, NAMES)}")
