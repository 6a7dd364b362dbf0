"""Encoder-decoder language models of the T5 family, frozen.

In: visual tokens `[B, Q, H]`, instructions, answers. Out: loss or text. The encoder reads
``[before image][visual][instruction]`` padded on the right, the decoder writes the answer
(SPEC 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clover.core.config import LanguageConfig
from clover.core.errors import CloverError
from clover.language.generation import collect_tokens, iterate_tokens, stream_text
from clover.language.prompt import Prompt
from clover.language.protocol import GenerationSettings
from clover.language.tokens import Tokens

_IGNORED = -100


class EncoderDecoder:
    """A frozen T5-shaped model behind the `LanguageModel` seam.

    Args:
        model: a transformers encoder-decoder model; it is put into eval mode and frozen.
        tokenizer: its tokenizer.
        prompt: how image and question are put.
        config: name, licence and token limits.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, prompt: Prompt, config: LanguageConfig
    ) -> None:
        # Paper: leaves the frozen model in train mode, dropout 0.1 active; here eval mode, because
        # a frozen reader that forgets a tenth of what it reads only adds noise to the gradient.
        self.model = model.eval().requires_grad_(False)
        self.prompt = prompt
        self.config = config
        self.tokens = Tokens(tokenizer, prompt.answer_end)
        self.id = config.weights
        self.licence = config.licence
        self.hidden_size = int(model.config.d_model)
        self._embed = model.get_input_embeddings()
        self._encoder = model.get_encoder()
        self._start_id = int(model.config.decoder_start_token_id or 0)
        self._prefix_ids = self.tokens.encode(prompt.before_image)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = self._embed.weight.device
        return device

    # Text level: the LanguageModel seam.

    def loss(
        self, visual: Tensor | None, instructions: Sequence[str], answers: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return summed token cross-entropy (float32) and answer token count (SPEC 4.1)."""
        return self.loss_from_ids(
            visual,
            [self.instruction_ids(text) for text in instructions],
            [self.answer_ids(text) for text in answers],
            prefix=self._prefix_ids,
        )

    def generate(
        self, visual: Tensor | None, instructions: Sequence[str], settings: GenerationSettings
    ) -> list[str]:
        """Return one answer an instruction."""
        prompts = [self.instruction_ids(text) for text in instructions]
        ids = self.generate_from_ids(visual, prompts, settings, prefix=self._prefix_ids)
        return [self.tokens.decode(row) for row in ids]

    def stream(
        self, visual: Tensor | None, instruction: str, settings: GenerationSettings
    ) -> Iterator[str]:
        """Yield one answer in pieces."""
        yield from self.stream_text(visual, self.prompt.split(instruction)[1], settings)

    def stream_text(
        self, visual: Tensor | None, after_image: str, settings: GenerationSettings
    ) -> Iterator[str]:
        """Yield one answer to a text that already carries the template (a conversation)."""
        ids = self._text_ids(after_image)
        if settings.num_beams > 1:
            rows = self.generate_from_ids(visual, [ids], settings, prefix=self._prefix_ids)
            yield self.tokens.decode(rows[0])
            return
        steps = self._steps(visual, [ids], settings, prefix=self._prefix_ids)
        yield from stream_text(steps, self.tokens)

    def rank(
        self, visual: Tensor | None, instruction: str, candidates: Sequence[str]
    ) -> list[float]:
        """Return the summed log-likelihood of each candidate, end token included."""
        if not candidates:
            raise CloverError("there are 0 candidate answers to rank; give at least one")
        scores: list[float] = []
        with torch.no_grad():
            state, mask = self._encode(visual, [self.instruction_ids(instruction)], ())
            for candidate in candidates:
                labels = torch.tensor([self.answer_ids(candidate)], device=self.device)
                logits = self._decode(state, mask, labels)
                losses = F.cross_entropy(logits[0], labels[0], reduction="sum")
                scores.append(-float(losses))
        return scores

    def instruction_ids(self, instruction: str) -> list[int]:
        """Return the ids after the image and the end token; long ones lose their beginning."""
        return self._text_ids(self.prompt.split(instruction)[1])

    def answer_ids(self, answer: str) -> list[int]:
        """Return the ids of an answer and its end; a long answer loses its end, not the token."""
        kept = self.tokens.encode(answer)[: self.config.max_answer_tokens - 1]
        return [*kept, self.tokens.end_id]

    def _text_ids(self, text: str) -> list[int]:
        eos = int(self.tokens.tokenizer.eos_token_id)
        kept = self.tokens.encode(text)[-(self.config.max_instruction_tokens - 1) :]
        return [*kept, eos]

    # Id level: for callers with their own tokenisation.

    def loss_from_ids(
        self,
        visual: Tensor | None,
        instruction_ids: Sequence[Sequence[int]],
        answer_ids: Sequence[Sequence[int]],
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
        instruction_ids: Sequence[Sequence[int]],
        answer_ids: Sequence[Sequence[int]],
        *,
        prefix: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return float32 logits `[B, T, V]` and labels `[B, T]` (-100 = ignored)."""
        state, mask = self._encode(visual, instruction_ids, prefix)
        ids, answer_mask = self._padded(answer_ids)
        labels = ids.masked_fill(answer_mask == 0, _IGNORED)
        return self._decode(state, mask, labels), labels

    def generate_from_ids(
        self,
        visual: Tensor | None,
        prompt_ids: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        prefix: Sequence[int] = (),
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Return the ids the decoder writes after its start token, end token included."""
        if not prompt_ids:
            return []
        if settings.num_beams > 1:
            return self._beam_search(visual, prompt_ids, settings, prefix=prefix)
        steps = self._steps(visual, prompt_ids, settings, prefix=prefix, seeds=seeds)
        return collect_tokens(steps, len(prompt_ids))

    # Inside.

    def _embedded(
        self, visual: Tensor | None, instruction_ids: Sequence[Sequence[int]], prefix: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return encoder embeddings `[B, P+Q+T, H]` and their mask."""
        ids, mask = self._padded(instruction_ids)
        words: Tensor = self._embed(ids)
        before = []
        if prefix:
            start = self._embed(torch.tensor([list(prefix)], device=self.device))
            before.append(start.expand(len(ids), -1, -1))
        if visual is not None:
            before.append(visual.to(words.device, words.dtype))
        embeds = torch.cat([*before, words], dim=1)
        ones = mask.new_ones(len(mask), embeds.shape[1] - mask.shape[1])
        return embeds, torch.cat([ones, mask], dim=1)

    def _encode(
        self, visual: Tensor | None, instruction_ids: Sequence[Sequence[int]], prefix: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        embeds, mask = self._embedded(visual, instruction_ids, prefix)
        state = self._encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return state, mask

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

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return ids `[B, T]` and mask `[B, T]`, padded on the right."""
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, values in enumerate(rows):
            ids[row, : len(values)] = torch.tensor(values, dtype=torch.long)
            mask[row, : len(values)] = 1
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def _steps(
        self,
        visual: Tensor | None,
        prompt_ids: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        prefix: Sequence[int] = (),
        seeds: Sequence[int] | None = None,
    ) -> Iterator[list[tuple[int, int]]]:
        stepper = _CachedSteps(self, *self._encode(visual, prompt_ids, prefix))
        start = torch.full((len(prompt_ids),), self._start_id, device=self.device)
        yield from iterate_tokens(
            stepper.step(start), stepper, settings, stop_ids=self.tokens.stop_ids, seeds=seeds
        )

    @torch.no_grad()
    def _beam_search(
        self,
        visual: Tensor | None,
        prompt_ids: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        prefix: Sequence[int],
    ) -> list[list[int]]:
        embeds, mask = self._embedded(visual, prompt_ids, prefix)
        out = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            num_beams=settings.num_beams,
            do_sample=False,
            max_new_tokens=settings.max_tokens,
            min_new_tokens=settings.min_tokens,
            repetition_penalty=settings.repetition_penalty,
            length_penalty=settings.length_penalty,
            eos_token_id=sorted(self.tokens.stop_ids),
        )
        rows: list[list[int]] = out[:, 1:].tolist()
        return rows


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
