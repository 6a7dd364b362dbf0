"""How image and question are put before the language model: one object for every stage.

In: the recipe's `PromptConfig`, which is saved in the model folder. Out: the text before the
visual tokens and the text after them. Training, evaluation and serving use the same object, so
that a model is never asked in another form than it was taught.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clover.core.config import PromptConfig
from clover.core.errors import CloverError

_IMAGE, _QUESTION = "{image}", "{question}"
EXAMPLES = "{examples}"
"""Where stage 2 writes worked examples; nothing stands there before."""


@dataclass(frozen=True)
class Prompt:
    """A template split at its image and its question."""

    config: PromptConfig
    before_image: str
    """Constant text before the visual tokens: its keys and values are computed only once."""
    before_question: str
    """Text between image and question."""
    after_question: str
    """Text between question and answer."""

    @classmethod
    def from_config(cls, config: PromptConfig) -> Prompt:
        """Parse the template.

        Raises:
            CloverError: not exactly one `{image}` followed by exactly one `{question}`.
        """
        template = config.template.replace(EXAMPLES, "")
        for slot in (_IMAGE, _QUESTION):
            if template.count(slot) != 1:
                raise CloverError(
                    f"prompt.template {template!r} holds {slot} {template.count(slot)} times; "
                    f"it needs it once, as in '{_IMAGE}{_QUESTION}'"
                )
        before_image, _, rest = template.partition(_IMAGE)
        if _QUESTION in before_image:
            raise CloverError(
                f"prompt.template {template!r} puts {_QUESTION} before {_IMAGE}; "
                "the image comes first, as in training of the published system"
            )
        before_question, _, after_question = rest.partition(_QUESTION)
        return cls(config, before_image, before_question, after_question)

    @property
    def answer_end(self) -> str:
        """Text that closes an answer; empty means the tokenizer's end of sequence."""
        return self.config.answer_end

    def question(self, text: str, *, is_closed: bool = False) -> str:
        """Return the question as it is put: a closed one carries the closed suffix."""
        suffix = self.config.closed_suffix
        return text + suffix if is_closed and not text.endswith(suffix) else text

    def split(self, question: str) -> tuple[str, str]:
        """Return the text before and after the visual tokens."""
        return self.before_image, f"{self.before_question}{question}{self.after_question}"

    def _opening(self) -> str:
        """Return what stands between an answer's end and the next turn's question.

        Worked examples before the image are not repeated: only the last turn's opening is.
        """
        if self.answer_end and self.answer_end in self.before_image:
            return self.before_image.rsplit(self.answer_end, 1)[1]
        return _between_turns(self.config) + self.before_image

    def conversation(self, turns: Sequence[tuple[str, str]], question: str) -> tuple[str, str]:
        """Return the text before and after the visual tokens when answers went before.

        The image stands in the first turn only; later turns repeat the template without it.

        Args:
            turns: earlier (question, answer) pairs, oldest first.
            question: the question to be answered now.
        """
        text, opening = "", ""
        for earlier, answer in turns:
            text += f"{opening}{self.before_question}{earlier}{self.after_question}"
            text += answer + self.answer_end
            opening = self._opening()
        before, after = self.split(question)
        return before, text + opening + after


def turn_end(config: PromptConfig) -> str:
    """Return what closes an answer before the next turn begins."""
    return config.answer_end + _between_turns(config)


def _between_turns(config: PromptConfig) -> str:
    # Chat templates end a turn with a line break; it belongs before the next turn.
    return "\n" if "\n" in config.template else " "
