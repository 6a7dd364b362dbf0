"""Decoder-only language models (Llama, SmolLM, Qwen, Vicuna, ...), frozen.

In: visual tokens `[B, Q, H]`, instructions, answers. Out: loss or text. A training row is
``[before image][visual][instruction][answer][end]`` padded on the right; a prompt to be answered
is ``[before image][visual][pads][instruction]``, so that all rows end together (SPEC 4.2, 4.3).
Three things keep it quick: the constant text before the image is computed once for all batches,
the vocabulary is scored only where an answer token is predicted, and nothing longer than the
longest row of the batch is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clover.core.config import LanguageConfig
from clover.core.errors import CloverError
from clover.language.generation import collect_tokens, iterate_tokens, stream_text
from clover.language.grouping import length_groups
from clover.language.prompt import Prompt
from clover.language.protocol import GenerationSettings
from clover.language.tokens import Tokens

_LOGIT_ROWS = 1024
"""Answer positions scored at a time: 1024 x 49152 float32 logits are 200 MB."""
_PASS_TOKENS_CPU, _PASS_TOKENS_DEVICE = 32, 2048
"""What one more forward pass costs, in tokens of padding it may save."""
_CANDIDATES = 64
"""Candidate answers ranked at a time."""


class DecoderOnly:
    """A frozen causal language model behind the `LanguageModel` seam.

    Args:
        model: a transformers causal language model; it is put into eval mode and frozen.
        tokenizer: its tokenizer.
        prompt: how image and question are put.
        config: name, licence and token limits.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, prompt: Prompt, config: LanguageConfig
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.prompt = prompt
        self.config = config
        self.tokens = Tokens(tokenizer, prompt.answer_end)
        self.id = config.weights
        self.licence = config.licence
        self.hidden_size = int(model.config.hidden_size)
        self._body = model.base_model
        self._embed = model.get_input_embeddings()
        self._head = model.get_output_embeddings()
        self._prefix_ids = tuple(self.tokens.encode(prompt.before_image))
        self._prefixes: dict[tuple[int, ...], Any] = {}
        self._softcap = getattr(model.config, "final_logit_softcapping", None)
        for scale in ("logit_scale", "logits_scaling"):
            if getattr(model.config, scale, None) not in (None, 1, 1.0):
                raise CloverError(
                    f"{model.config.model_type} scales its logits ({scale}), which is not "
                    "supported; use a Llama, Qwen, Mistral, Gemma or SmolLM model"
                )

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = self._embed.weight.device
        return device

    @property
    def max_positions(self) -> int:
        """Longest sequence the model was made for."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 30))

    # Text level: the LanguageModel seam.

    def loss(
        self, visual: Tensor | None, instructions: Sequence[str], answers: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return summed token cross-entropy (float32) and answer token count (SPEC 4.2)."""
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
        ids = self._truncate(self.tokens.encode(after_image))
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
        ids = self.instruction_ids(instruction)
        answers = [self.answer_ids(text) for text in candidates]
        scores: list[float] = []
        with torch.no_grad():
            # The prompt is computed once; only its last token runs again with each candidate.
            cache, _ = self._read_prompt(visual, [ids[:-1]], self._prefix_ids)
            for start in range(0, len(answers), _CANDIDATES):
                chunk = answers[start : start + _CANDIDATES]
                losses, rows = self._answer_losses(
                    None, [ids[-1:]] * len(chunk), chunk, past=_repeated(cache, len(chunk))
                )
                sums = losses.new_zeros(len(chunk)).index_add(0, rows, losses)
                scores += (-sums).tolist()
        return scores

    def choose(
        self, visual: Tensor | None, instructions: Sequence[str], candidates: Sequence[str]
    ) -> list[int]:
        """Return the index of the likeliest candidate for each instruction."""
        chosen = []
        for row, instruction in enumerate(instructions):
            image = None if visual is None else visual[row : row + 1]
            scores = self.rank(image, instruction, candidates)
            chosen.append(max(range(len(scores)), key=scores.__getitem__))
        return chosen

    def instruction_ids(self, instruction: str) -> list[int]:
        """Return the ids after the image; a long instruction loses its beginning."""
        return self._truncate(self.tokens.encode(self.prompt.split(instruction)[1]))

    def answer_ids(self, answer: str) -> list[int]:
        """Return the ids of an answer and its end; a long answer loses both end and end token."""
        ids = [*self.tokens.encode(answer), self.tokens.end_id]
        return ids[: self.config.max_answer_tokens]

    def _truncate(self, ids: list[int]) -> list[int]:
        return ids[-self.config.max_instruction_tokens :]

    # Id level: for callers with their own tokenisation.

    def loss_from_ids(
        self,
        visual: Tensor | None,
        instruction_ids: Sequence[Sequence[int]],
        answer_ids: Sequence[Sequence[int]],
        *,
        prefix: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return summed cross-entropy and token count of ``[prefix][visual][instruction][answer]``.

        Args:
            visual: `[B, Q, H]` or none.
            instruction_ids: B id lists.
            answer_ids: B id lists; each of their tokens carries loss.
            prefix: ids that stand before the visual tokens of every row.
        """
        lengths = [len(i) + len(a) for i, a in zip(instruction_ids, answer_ids, strict=True)]
        total = torch.zeros((), device=self.device)
        # Short and long answers apart: yes/no rows do not pay for a long description's width.
        overhead = _PASS_TOKENS_CPU if self.device.type == "cpu" else _PASS_TOKENS_DEVICE
        for rows in length_groups(lengths, overhead):
            losses, _ = self._answer_losses(
                None if visual is None else visual[rows],
                [instruction_ids[row] for row in rows],
                [answer_ids[row] for row in rows],
                past=self._prefix_cache(prefix, len(rows)),
            )
            total = total + losses.sum()
        return total, torch.tensor(sum(map(len, answer_ids)), device=self.device)

    def logits_from_ids(self, visual: Tensor | None, text_ids: Tensor, mask: Tensor) -> Tensor:
        """Return `[B, Q+T, V]` float32 logits of ``[visual][text]``, every position: the slow way.

        Args:
            visual: `[B, Q, H]` or none.
            text_ids: `[B, T]`.
            mask: `[B, T]`, 1 where `text_ids` is a token.
        """
        embeds = self._with_visual(visual, text_ids)
        ones = mask.new_ones(len(mask), embeds.shape[1] - mask.shape[1])
        full = torch.cat([ones, mask], dim=1)
        hidden = self._body(inputs_embeds=embeds, attention_mask=full, use_cache=False)
        return self._logits(hidden.last_hidden_state)

    def generate_from_ids(
        self,
        visual: Tensor | None,
        prompt_ids: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        prefix: Sequence[int] = (),
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Return the ids written after ``[prefix][visual][pads][prompt]``, end token included."""
        if not prompt_ids:
            return []
        if settings.num_beams > 1:
            return self._beam_search(visual, [[*prefix], *map(list, prompt_ids)], settings)
        steps = self._steps(visual, prompt_ids, settings, prefix=prefix, seeds=seeds)
        return collect_tokens(steps, len(prompt_ids))

    # Inside.

    def _answer_losses(
        self,
        visual: Tensor | None,
        instruction_ids: Sequence[Sequence[int]],
        answer_ids: Sequence[Sequence[int]],
        *,
        past: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each answer token `[N]` and the row it belongs to `[N]`."""
        joined = [[*i, *a] for i, a in zip(instruction_ids, answer_ids, strict=True)]
        # The last token predicts nothing that is asked for.
        ids, _ = self._padded([row[:-1] for row in joined])
        embeds = self._with_visual(visual, ids)  # [B, Q+T, H]
        num_queries = embeds.shape[1] - ids.shape[1]
        # No mask: pads are on the right and attention is causal, so no answer token sees one.
        hidden = self._body(
            inputs_embeds=embeds, past_key_values=past, use_cache=past is not None
        ).last_hidden_state
        rows: list[int] = []
        columns: list[int] = []
        labels: list[int] = []
        for row, (instruction, answer) in enumerate(zip(instruction_ids, answer_ids, strict=True)):
            first = num_queries + len(instruction) - 1
            assert first >= 0, "an answer needs at least one visual or instruction token before it"
            rows += [row] * len(answer)
            columns += range(first, first + len(answer))
            labels += answer
        row_index = torch.tensor(rows, device=self.device)
        picked = hidden[row_index, torch.tensor(columns, device=self.device)]  # [N, H]
        return self._cross_entropy(picked, torch.tensor(labels, device=self.device)), row_index

    def _cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return `[N]` float32 cross-entropies of `[N, H]` hidden states, in chunks."""
        if len(hidden) <= _LOGIT_ROWS:
            return F.cross_entropy(self._logits(hidden), labels, reduction="none")
        from torch.utils.checkpoint import checkpoint

        def score(part: Tensor, wanted: Tensor) -> Tensor:
            return F.cross_entropy(self._logits(part), wanted, reduction="none")

        # Logits are recomputed in the backward pass: keeping them costs 4 V bytes a token.
        chunks = zip(
            torch.split(hidden, _LOGIT_ROWS), torch.split(labels, _LOGIT_ROWS), strict=True
        )
        return torch.cat([checkpoint(score, h, y, use_reentrant=False) for h, y in chunks])

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden).float()
        if self._softcap:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    def _padded(
        self, rows: Sequence[Sequence[int]], *, left: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return ids `[B, T]` and mask `[B, T]`, as wide as the longest row."""
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, values in enumerate(rows):
            place = slice(width - len(values), None) if left else slice(0, len(values))
            ids[row, place] = torch.tensor(values, dtype=torch.long)
            mask[row, place] = 1
        return ids.to(self.device), mask.to(self.device)

    def _with_visual(self, visual: Tensor | None, ids: Tensor) -> Tensor:
        """Return `[B, Q+T, H]` embeddings of ``[visual][ids]``."""
        words: Tensor = self._embed(ids)
        if visual is None:
            return words
        return torch.cat([visual.to(words.device, words.dtype), words], dim=1)

    def _prefix_cache(self, prefix: Sequence[int], num_rows: int) -> Any:
        """Return a fresh cache that holds the constant prefix for every row; none if empty."""
        if not prefix:
            return None
        key = tuple(prefix)
        if key not in self._prefixes:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.model.config)
            # no_grad, not inference_mode: training concatenates these with tensors that learn.
            with torch.no_grad():
                ids = torch.tensor([key], device=self.device)
                self._body(input_ids=ids, past_key_values=cache, use_cache=True)
            while len(self._prefixes) >= 4:
                self._prefixes.pop(next(iter(self._prefixes)))
            self._prefixes[key] = cache
        return _repeated(self._prefixes[key], num_rows)

    def _read_prompt(
        self, visual: Tensor | None, prompt_ids: Sequence[Sequence[int]], prefix: Sequence[int]
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Run ``[prefix][visual][pads][prompt]``; return the cache, and (last hidden, mask)."""
        from transformers import DynamicCache

        num_rows = len(prompt_ids)
        cache = self._prefix_cache(prefix, num_rows) or DynamicCache(config=self.model.config)
        ids, mask = self._padded(prompt_ids, left=True)
        embeds = self._with_visual(visual, ids)
        before = len(prefix) + embeds.shape[1] - ids.shape[1]
        mask = torch.cat([mask.new_ones(num_rows, before), mask], dim=1)  # [B, P+Q+T]
        if not embeds.shape[1]:
            return cache, (embeds, mask)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, len(prefix) :]
        hidden = self._body(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return cache, (hidden[:, -1], mask)

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
        self._check_length(visual, prompt_ids, len(prefix) + settings.max_tokens)
        cache, (hidden, mask) = self._read_prompt(visual, prompt_ids, prefix)
        stepper = _CachedSteps(self, cache, mask)
        yield from iterate_tokens(
            self._logits(hidden),
            stepper,
            settings,
            stop_ids=self.tokens.stop_ids,
            seeds=seeds,
        )

    def _check_length(
        self, visual: Tensor | None, prompt_ids: Sequence[Sequence[int]], extra: int
    ) -> None:
        longest = max(map(len, prompt_ids)) + (0 if visual is None else visual.shape[1])
        if longest + extra > self.max_positions:
            raise CloverError(
                f"the prompt has {longest} tokens and {extra} more are reserved, together more "
                f"than the model's {self.max_positions}; shorten the prompt or max_tokens"
            )

    @torch.no_grad()
    def _beam_search(
        self,
        visual: Tensor | None,
        prefix_and_prompts: list[list[int]],
        settings: GenerationSettings,
    ) -> list[list[int]]:
        """Beam search by transformers; the prefix is computed again, without the cache."""
        prefix, *prompts = prefix_and_prompts
        self._check_length(visual, prompts, len(prefix) + settings.max_tokens)
        ids, mask = self._padded(prompts, left=True)
        embeds = self._with_visual(visual, ids)
        start = self._embed(torch.tensor([prefix] * len(prompts), device=self.device).long())
        embeds = torch.cat([start.reshape(len(prompts), len(prefix), -1), embeds], dim=1)
        ones = mask.new_ones(len(mask), embeds.shape[1] - mask.shape[1])
        out = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.cat([ones, mask], dim=1),
            num_beams=settings.num_beams,
            do_sample=False,
            max_new_tokens=settings.max_tokens,
            min_new_tokens=settings.min_tokens,
            repetition_penalty=settings.repetition_penalty,
            length_penalty=settings.length_penalty,
            eos_token_id=sorted(self.tokens.stop_ids),
            pad_token_id=self.tokens.end_id,
        )
        rows: list[list[int]] = out.tolist()
        return rows


class _CachedSteps:
    """One token a row and step through the model, from a cache."""

    def __init__(self, language: DecoderOnly, cache: Any, mask: Tensor) -> None:
        self.language = language
        self.cache = cache
        self.mask = mask
        self.position = mask.sum(dim=1)  # [B]

    def step(self, ids: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        hidden = self.language._body(
            input_ids=ids[:, None],
            attention_mask=self.mask,
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.position = self.position + 1
        return self.language._logits(hidden[:, -1])

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self.position = self.position[rows]


def _repeated(cache: Any, num_rows: int) -> Any:
    """Return a copy of a one-row cache with `num_rows` rows."""
    copied = copy.deepcopy(cache)
    if num_rows > 1:
        copied.batch_repeat_interleave(num_rows)
    return copied
