"""The frozen language model behind one seam: loss, generation, streaming, ranking."""

from clover.language.prompt import Prompt
from clover.language.protocol import GenerationSettings, LanguageModel

__all__ = ["GenerationSettings", "LanguageModel", "Prompt"]
