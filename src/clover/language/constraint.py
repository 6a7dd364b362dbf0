"""Replies that parse: which tokens may come next so that a text stays within a JSON schema.

In: a tokenizer and a schema. Out: a `Constraint` a row of a batch, read by `generation`. The
grammar itself is llguidance's, an optional wheel of 3 MB without dependencies: a mask over the
vocabulary costs it less than a millisecond, where a step of the smallest model costs twenty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clover.core.errors import CloverError
from clover.language.tokens import Tokens

Schema = Mapping[str, Any]
"""A JSON schema: object, array, string, number, boolean, enum, const, pattern, lengths, anyOf."""


class SchemaCompiler:
    """Makes constraints for one tokenizer; to build it costs about half a second.

    Args:
        tokens: The tokenizer, and the ids that end a text.
        vocabulary: Scores V that the model gives a token; may be more than the tokenizer's.

    Raises:
        CloverError: llguidance is not installed, or does not know this kind of tokenizer.
    """

    def __init__(self, tokens: Tokens, vocabulary: int) -> None:
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise CloverError(
                "answers in a JSON schema need llguidance, which is not installed; install "
                "CLOVER with its extra [structured], or ask without response_format"
            ) from error
        self._matcher = llguidance.LLMatcher
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokens.tokenizer, n_vocab=vocabulary, eos_token=sorted(tokens.stop_ids)
            )
        except Exception as error:  # whatever a tokenizer of another kind makes Rust say
            reason = str(error).splitlines()[0]
            raise CloverError(
                f"this tokenizer cannot be held to a JSON schema ({reason}); ask without "
                "response_format"
            ) from error

    def compile(self, schema: Schema) -> CompiledSchema:
        """Return a schema in the form that rows begin with.

        Raises:
            CloverError: it is no JSON schema, or uses a keyword that cannot be held to.
        """
        # No white space between the parts: a small model that may write blanks writes nothing else.
        grammar = self._matcher.grammar_from_json_schema(
            dict(schema), overrides={"whitespace_flexible": False}
        )
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:200]
            raise CloverError(f"the JSON schema cannot be held to: {reason}")
        return CompiledSchema(matcher)


class CompiledSchema:
    """A schema that any number of rows may be held to."""

    def __init__(self, matcher: Any) -> None:
        self._fresh = matcher

    def begin(self) -> SchemaConstraint:
        """Return the constraint of a row that has written nothing."""
        return SchemaConstraint(self._fresh.deep_copy())


class SchemaConstraint:
    """Where one row stands in its schema."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self) -> Tensor:
        """Return which tokens may come next, `[V]` booleans; an end token once it is whole."""
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = torch.arange(8, dtype=torch.uint8)
        return ((packed[:, None] >> bits) & 1).flatten().bool()  # [V], up to 31 more

    def accept(self, token: int) -> None:
        """Take note of the token that was written."""
        accepted = self._matcher.consume_token(token)
        assert accepted, f"token {token} was not among those allowed"
