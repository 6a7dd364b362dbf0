"""What tokens cost, and how many of them a text will be.

The estimate is made without a tokeniser's files (closed networks have none), from how byte-pair
encodings cut English: it predicts; the ledger counts what the endpoint reports.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from clover.core.errors import CloverError
from clover.instruct.lists import load_yaml

_PIECE = re.compile(r"[^\W\d_]+|\d{1,3}|[^\w\s]+|_+|\n+")
# Tokens that a chat format spends around a message, and once a request.
_PER_MESSAGE = 4
_PER_REQUEST = 3
# Letters that one token carries on average beyond the first piece of a word (see docs/instruct.md).
_LETTERS_PER_PIECE = 4.5
_WHOLE_WORD = 7
# Words in capitals are rare in what tokenisers learn from, and fall apart.
_LETTERS_PER_CAPITAL_PIECE = 2.2


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input_usd: float
    output_usd: float
    source: str = "given"

    def dollars(self, input_tokens: float, output_tokens: float) -> float:
        """Return the dollars of so many tokens."""
        return (input_tokens * self.input_usd + output_tokens * self.output_usd) / 1e6

    def halved(self) -> Price:
        """Return the Batch API's price."""
        share = float(load_yaml("prices")["batch_discount"])
        return Price(self.input_usd * share, self.output_usd * share, f"{self.source}, batch")


def parse_price(text: str) -> Price:
    """Read ``input,output`` in dollars per million tokens.

    Raises:
        CloverError: anything else.
    """
    try:
        first, second = (float(part) for part in text.split(","))
        if not (0 <= first < 1e6 and 0 <= second < 1e6):
            raise ValueError
    except ValueError as error:
        raise CloverError(
            f"--price '{text}' is not input,output in dollars per million tokens, e.g. 0.5,1.5"
        ) from error
    return Price(first, second)


def find_price(model: str, *, is_local: bool) -> Price | None:
    """Return a model's listed price, 0 for one on this machine, or None when it is unknown.

    Raises:
        CloverError: a dated version that is not listed, of a model that is: versions differ in
            price, so no cap could be kept.
    """
    if is_local:
        return Price(0.0, 0.0, "on this machine")
    table = load_yaml("prices")
    name = model.lower().rsplit("/", 1)[-1]
    if name in table["models"]:
        input_usd, output_usd = table["models"][name]
        return Price(input_usd, output_usd, f"listed on {table['dated']}")
    # gpt-4o-audio is another model than gpt-4o; gpt-4o-2024-05-13 is a version of it.
    if any(re.fullmatch(rf"{re.escape(listed)}-\d{{4}}.*", name) for listed in table["models"]):
        raise CloverError(
            f"no price is listed for the dated version '{model}'; give --price input,output in "
            "dollars per million tokens; nothing sent"
        )
    return None


def estimate_tokens(text: str) -> int:
    """Estimate how many tokens a text is, without a tokeniser's files."""
    count = 0.0
    for piece in _PIECE.findall(text):
        if not piece[0].isascii():
            count += max(1.0, len(piece.encode()) / 2.5)
        elif piece.isupper() and len(piece) > 3:
            count += len(piece) / _LETTERS_PER_CAPITAL_PIECE
        elif piece[0].isalpha():
            extra = max(0, len(piece) - _WHOLE_WORD)
            count += 1 + extra / _LETTERS_PER_PIECE
        else:
            count += 1
    return round(count)


def estimate_message_tokens(messages: list[dict[str, str]]) -> int:
    """Estimate the tokens of a chat request, its format included."""
    texts = sum(estimate_tokens(message["content"]) for message in messages)
    return texts + _PER_MESSAGE * len(messages) + _PER_REQUEST
