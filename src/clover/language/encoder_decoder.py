"""Encoder-decoder language models of the T5 family, frozen.

In: visual tokens `[B, Q, H]`, instructions, answers. Out: loss or text. The encoder reads
``[before image][visual][instruction]`` padded on the right, the decoder writes the answer
(SPEC 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clover.core.config import LanguageConfig
from clover.core.errors import CloverError
from clover.language.frozen import FrozenLanguage, Ids, with_ones_before
from clover.language.prompt import Prompt

_IGNORED = -100


class EncoderDecoder(FrozenLanguage):
    """A frozen T5-shaped model behind the `LanguageModel` seam."""

    # Paper: leaves the frozen model in train mode, dropout 0.1 active; here eval mode, because
    # a frozen reader that forgets a tenth of what it reads only adds noise to the gradient.

    def __init__(
        self, model: Any, tokenizer: Any, *, prompt: Prompt, config: LanguageConfig
    ) -> None:
        super().__init__(model, tokenizer, prompt=prompt, config=config)
        self._encoder = model.get_encoder()
        self._start_id = int(model.config.decoder_start_token_id or 0)
        eos = tokenizer.eos_token_id
        self._text_end = [] if eos is None else [int(eos)]

    def text_ids(self, after_image: str) -> list[int]:
        """Return the ids of a text and its end token; a long one loses its beginning."""
        limit = self.config.max_instruction_tokens - len(self._text_end)
        return [*self.tokens.encode(after_image)[-limit:], *self._text_end]

    def answer_ids(self, answer: str) -> list[int]:
        """Return the ids of an answer and its end; a long answer loses its end, not the token."""
        kept = self.tokens.encode(answer)[: self.config.max_answer_tokens - 1]
        return [*kept, self.tokens.end_id]

    def loss_from_ids(
        self,
        visual: Tensor | None,
        instruction_ids: Ids,
        answer_ids: Ids,
        *,
        prefix: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return summed cross-entropy and token count of the answers.

        Args:
            visual: `[B, Q, H]` or none.
            instruction_ids: B id lists, end token included.
            answer_ids: B id lists, end token included; each token carries loss.
            prefix: ids that stand before the visual tokens of every row.
        """
        logits, labels = self.logits_from_ids(visual, instruction_ids, answer_ids, prefix=prefix)
        total = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="sum"
        )
        return total, (labels != _IGNORED).sum()

    def logits_from_ids(
        self,
        visual: Tensor | None,
        instruction_ids: Ids,
        answer_ids: Ids,
        *,
        prefix: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return float32 logits `[B, T, V]` and labels `[B, T]` (-100 = ignored)."""
        state, mask = self._encode(visual, instruction_ids, prefix)
        ids, answer_mask = self._padded(answer_ids)
        labels = ids.masked_fill(answer_mask == 0, _IGNORED)
        return self._decode(state, mask, labels), labels

    def rank(
        self, visual: Tensor | None, instruction: str, candidates: Sequence[str]
    ) -> list[float]:
        """Return the summed log-likelihood of each candidate, end token included."""
        if not candidates:
            raise CloverError("there are 0 candidate answers to rank; give at least one")
        scores: list[float] = []
        with torch.no_grad():
            prompts = [self.instruction_ids(instruction)]
            state, mask = self._encode(visual, prompts, self.prefix_ids)
            for candidate in candidates:
                labels = torch.tensor([self.answer_ids(candidate)], device=self.device)
                logits = self._decode(state, mask, labels)
                scores.append(-float(F.cross_entropy(logits[0], labels[0], reduction="sum")))
        return scores

    def _embedded(
        self, visual: Tensor | None, prompt_ids: Ids, prefix: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        ids, mask = self._padded(prompt_ids)
        embeds = self._joined(prefix, visual, ids)
        return embeds, with_ones_before(mask, embeds.shape[1])

    def _encode(
        self, visual: Tensor | None, prompt_ids: Ids, prefix: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the encoder's states `[B, P+Q+T, H]` and their mask."""
        embeds, mask = self._embedded(visual, prompt_ids, prefix)
        return self._encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state, mask

    def _decode(self, state: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return float32 logits `[B, T, V]` of the decoder fed with the labels shifted right."""
        from transformers.modeling_outputs import BaseModelOutput

        fed = labels.masked_fill(labels == _IGNORED, self.model.config.pad_token_id or 0)
        start = torch.full_like(fed[:, :1], self._start_id)
        logits: Tensor = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=state),
            attention_mask=mask,
            decoder_input_ids=torch.cat([start, fed[:, :-1]], dim=1),
            decoder_attention_mask=(labels != _IGNORED).long(),
            use_cache=False,
        ).logits
        return logits.float()

    def _begin(
        self, visual: Tensor | None, prompt_ids: Ids, prefix: Sequence[int], max_tokens: int
    ) -> tuple[Tensor, _CachedSteps]:
        stepper = _CachedSteps(self, *self._encode(visual, prompt_ids, prefix))
        start = torch.full((len(prompt_ids),), self._start_id, device=self.device)
        return stepper.step(start), stepper

    def _beam_search(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        # The decoder's row begins with its start token, which nobody wrote.
        return [row[1:] for row in super()._beam_search(*args, **kwargs)]


class _CachedSteps:
    """One token a row and step through the decoder, from a cache."""

    def __init__(self, language: EncoderDecoder, state: Tensor, mask: Tensor) -> None:
        self.language = language
        self.state = state
        self.mask = mask
        self.cache: Any = None

    def step(self, ids: Tensor) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        out = self.language.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.state),
            attention_mask=self.mask,
            decoder_input_ids=ids[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.state = self.state[rows]
        self.mask = self.mask[rows]
