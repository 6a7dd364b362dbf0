"""Decoder-only language models (Llama, SmolLM, Qwen, Vicuna, ...), frozen.

In: visual tokens `[B, Q, H]`, instructions, answers. Out: loss or text. A training row is
``[before image][visual][instruction][answer][end]`` padded on the right; a prompt to be answered
is ``[before image][visual][pads][instruction]``, so that all rows end together (SPEC 4.2, 4.3).
Four things keep it quick: the constant text before the image is computed once and read by all rows
without a copy (`shared_prefix`), the vocabulary is scored only where an answer token is predicted,
rows are learnt from one after another without padding (`packed`), and where that cannot be, rows of
like length run together.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clover.core.config import LanguageConfig
from clover.core.errors import CloverError
from clover.language.frozen import FrozenLanguage, Ids, with_ones_before
from clover.language.grouping import length_groups
from clover.language.lean import LeanDecoder
from clover.language.packed import PackedRows, packed, reads_token_by_token
from clover.language.prompt import Prompt
from clover.language.shared_prefix import SharedPrefix, behind, causal_by_itself, share_prefix

_LOGIT_ROWS = 1024
"""Answer positions scored at a time: 1024 x 49152 float32 logits are 200 MB."""
_PASS_TOKENS_CPU, _PASS_TOKENS_DEVICE = 32, 2048
"""What one more forward pass costs, in tokens of padding it may save."""
_NO_SECOND_PASS = 1 << 40
"""One pass a batch: where processes compute each together and must make as many as the others, and
where rows are packed, since nothing is padded."""
_CANDIDATES = 64
"""Candidate answers ranked at a time."""
_KEPT_PREFIXES = 4
"""Constant beginnings whose keys and values are kept."""


_WIDTHS, _ANSWERS = 16, 64
"""Rows are padded to a multiple of so many tokens, and answers to so many, where few shapes are
wanted (`AnswerBatch`)."""


@dataclass(frozen=True)
class AnswerBatch:
    """Instructions and answers as tensors: a loss of them waits for no device.

    Attributes:
        ids: ``[instruction][answer][pads]`` of each row `[B, T]`.
        places: Of what predicts an answer's token, among all `B (Q + T)` hidden states `[N]`.
        labels: The tokens; -100 for none `[N]`.
        count: How many there are.
    """

    ids: Tensor
    places: Tensor
    labels: Tensor
    count: int


@dataclass(frozen=True)
class _Past:
    """What stands before the tokens that are read next."""

    num_tokens: int
    cache: Any = None
    """transformers' cache of each row; none where nothing is kept."""
    shared: SharedPrefix | None = None
    """The beginning of all rows, where the cache does not hold it."""

    @property
    def num_shared(self) -> int:
        """Tokens that the mask does not speak of: they stand outside the cache."""
        return 0 if self.shared is None else self.shared.num_tokens


class DecoderOnly(FrozenLanguage):
    """A frozen causal language model behind the `LanguageModel` seam."""

    def __init__(
        self, model: Any, tokenizer: Any, *, prompt: Prompt, config: LanguageConfig
    ) -> None:
        super().__init__(model, tokenizer, prompt=prompt, config=config)
        self._body = model.base_model
        self._head = model.get_output_embeddings()
        self._prefixes: dict[Any, Any] = {}
        self._is_shared = share_prefix(model)
        self._lean = LeanDecoder.of(model) if self._is_shared else None
        self._is_token_wise = reads_token_by_token(model)
        self._softcap = getattr(model.config, "final_logit_softcapping", None)
        for scale in ("logit_scale", "logits_scaling"):
            if getattr(model.config, scale, None) not in (None, 1, 1.0):
                raise CloverError(
                    f"{model.config.model_type} scales its logits ({scale}), which is not "
                    "supported; use a Llama, Qwen, Mistral, Gemma or SmolLM model"
                )

    @property
    def can_share_prefix(self) -> bool:
        """Whether rows can read one copy of a beginning (`shared_prefix`)."""
        return self._is_shared

    @property
    def max_positions(self) -> int:
        """Longest sequence the model was made for."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 30))

    def text_ids(self, after_image: str) -> list[int]:
        """Return the ids of a text after the image; a long one loses its beginning."""
        limit = self.config.max_instruction_tokens - len(self._start_text)
        return [*self._start_text, *self.tokens.encode(after_image)[-limit:]]

    def answer_ids(self, answer: str) -> list[int]:
        """Return the ids of an answer and its end; a long answer loses both end and end token."""
        ids = [*self.tokens.encode(answer), self.tokens.end_id]
        return ids[: self.config.max_answer_tokens]

    def loss_from_ids(
        self,
        visual: Tensor | None,
        instruction_ids: Ids,
        answer_ids: Ids,
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
        if getattr(self.model, "is_spread", False) or self._packs:
            overhead = _NO_SECOND_PASS
        for rows in length_groups(lengths, overhead):
            losses, _ = self._answer_losses(
                None if visual is None else visual[rows],
                [instruction_ids[row] for row in rows],
                [answer_ids[row] for row in rows],
                past=self._past(prefix, len(rows), is_kept=False),
            )
            total = total + losses.sum()
        return total, torch.tensor(sum(map(len, answer_ids)), device=self.device)

    def answer_batch(
        self, instructions: Sequence[str], answers: Sequence[str], *, num_queries: int
    ) -> AnswerBatch:
        """Return B instructions and answers for `loss_of_batch`, on the CPU, in one of few shapes.

        Args:
            instructions: B questions, without template.
            answers: B answers, without end token.
            num_queries: Visual tokens that will stand before each.
        """
        return self.answer_batch_from_ids(
            [self.instruction_ids(text) for text in instructions],
            [self.answer_ids(text) for text in answers],
            num_queries=num_queries,
        )

    @staticmethod
    def answer_batch_from_ids(asked: Ids, said: Ids, *, num_queries: int) -> AnswerBatch:
        """Return the same of B id lists each."""
        # The last token predicts nothing that is asked for.
        rows = [[*i, *a][:-1] for i, a in zip(asked, said, strict=True)]
        width = -(-max(map(len, rows)) // _WIDTHS) * _WIDTHS
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for row, values in enumerate(rows):
            ids[row, : len(values)] = torch.tensor(values)
        length = num_queries + width
        starts = range(0, len(rows) * length, length)
        places = _predicting(asked, said, starts=starts, num_queries=num_queries)
        labels = [token for answer in said for token in answer]
        more = (0, -len(labels) % _ANSWERS)
        return AnswerBatch(
            ids,
            F.pad(torch.tensor(places), more),
            F.pad(torch.tensor(labels), more, value=-100),
            len(labels),
        )

    @property
    def can_be_replayed(self) -> bool:
        """Whether `loss_of_batch` waits for no device.

        Some models wait: experts for how many tokens each has, positions that are stretched for
        how many there are, eight bits for the largest values.
        """
        config = self.model.config
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        experts = ("num_experts", "num_local_experts", "n_routed_experts")
        return (
            self._is_shared
            and self.config.quantise == "none"
            and not self.config.paper_dropout
            and rope in ("default", "linear", "llama3")
            and not any(getattr(config, name, None) for name in experts)
            and not getattr(self.model, "is_spread", False)
        )

    def loss_of_batch(self, visual: Tensor, batch: AnswerBatch) -> Tensor:
        """Return the summed cross-entropy of ``[prefix][visual][instruction][answer]`` (float32).

        Args:
            visual: `[B, Q, H]`; gradients flow into it and nowhere else.
            batch: From `answer_batch` for Q queries, on the model's device.
        """
        past = self._past(self.prefix_ids, len(batch.ids), is_kept=False)
        with causal_by_itself(self.model):
            hidden = self._read_behind(visual, batch.ids, past)
        return self._cross_entropy(hidden.flatten(0, 1)[batch.places], batch.labels).sum()

    def logits_from_ids(self, visual: Tensor | None, text_ids: Tensor, mask: Tensor) -> Tensor:
        """Return `[B, Q+T, V]` float32 logits of ``[visual][text]``, every position: the slow way.

        Args:
            visual: `[B, Q, H]` or none.
            text_ids: `[B, T]`.
            mask: `[B, T]`, 1 where `text_ids` is a token.
        """
        embeds = self._joined((), visual, text_ids)
        full = with_ones_before(mask, embeds.shape[1])
        hidden = self.hidden(inputs_embeds=embeds, attention_mask=full, use_cache=False)
        return self.logits(hidden)

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
            past, _, _ = self._read_prompt(visual, [ids[:-1]], self.prefix_ids)
            for start in range(0, len(answers), _CANDIDATES):
                chunk = answers[start : start + _CANDIDATES]
                losses, rows = self._answer_losses(
                    None, [ids[-1:]] * len(chunk), chunk, past=_repeated(past, len(chunk))
                )
                sums = losses.new_zeros(len(chunk)).index_add(0, rows, losses)
                scores += (-sums).tolist()
        return scores

    def _answer_losses(
        self, visual: Tensor | None, instruction_ids: Ids, answer_ids: Ids, *, past: _Past
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each answer token `[N]` and the row it belongs to `[N]`."""
        joined = [[*i, *a] for i, a in zip(instruction_ids, answer_ids, strict=True)]
        # The last token predicts nothing that is asked for.
        read = self._read_packed if self._packs else self._read_padded
        hidden, starts = read(visual, [row[:-1] for row in joined], past)
        places = _predicting(
            instruction_ids,
            answer_ids,
            starts=starts,
            num_queries=0 if visual is None else visual.shape[1],
        )
        rows = [row for row, answer in enumerate(answer_ids) for _ in answer]
        labels = [token for answer in answer_ids for token in answer]
        row_index = torch.tensor(rows, device=self.device)
        picked = hidden[torch.tensor(places, device=self.device)]  # [N, H]
        return self._cross_entropy(picked, torch.tensor(labels, device=self.device)), row_index

    @property
    def _packs(self) -> bool:
        """Whether rows are read one after another now, without padding: to learn, on the CPU."""
        # A device reads a padded batch by fused kernels, and processes a spread model together.
        return (
            self._is_shared
            and self._is_token_wise
            and self.device.type == "cpu"
            and torch.is_grad_enabled()
            and not self.model.training
            and not getattr(self.model, "is_spread", False)
        )

    def _read_padded(
        self, visual: Tensor | None, ids: Ids, past: _Past
    ) -> tuple[Tensor, Sequence[int]]:
        """Return hidden states `[B T, H]` of ``[visual][ids][pads]`` and where each row begins."""
        hidden = self._read_behind(visual, self._padded(ids)[0], past)
        batch, length, _ = hidden.shape
        return hidden.flatten(0, 1), range(0, batch * length, length)

    def _read_behind(self, visual: Tensor | None, ids: Tensor, past: _Past) -> Tensor:
        """Return hidden states `[B, Q+T, H]` of ``[visual][ids]``; ids `[B, T]`, pads behind."""
        embeds = self._joined((), visual, ids)
        # No mask: pads are on the right and attention is causal, so no answer token sees one.
        positions = torch.arange(embeds.shape[1], device=self.device)[None] + past.num_tokens
        return self._read(past, inputs_embeds=embeds, position_ids=positions)

    def _read_packed(
        self, visual: Tensor | None, ids: Ids, past: _Past
    ) -> tuple[Tensor, Sequence[int]]:
        """Return hidden states `[N, H]` of ``[visual][ids]`` of each row, and where it begins."""
        assert past.cache is None, "packed rows are read once, and kept by nobody"
        sizes = list(map(len, ids))
        flat = torch.tensor([token for row in ids for token in row], dtype=torch.long)
        words = self._embed(flat)
        num_queries = 0
        if visual is not None:
            num_queries = visual.shape[1]
            parts = zip(self._as_words(visual), words.split(sizes), strict=True)
            words = torch.cat([part for pair in parts for part in pair])
        rows = PackedRows([num_queries + size for size in sizes])
        positions = rows.places[None] + past.num_tokens
        with packed(rows):
            hidden = self._read(past, inputs_embeds=words[None], position_ids=positions)
        return hidden[0], rows.starts

    def _cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return `[N]` float32 cross-entropies of `[N, H]` hidden states, in chunks."""
        if len(hidden) <= _LOGIT_ROWS:
            return F.cross_entropy(self.logits(hidden), labels, reduction="none")
        from torch.utils.checkpoint import checkpoint

        def score(part: Tensor, wanted: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(part), wanted, reduction="none")

        # Logits are recomputed in the backward pass: keeping them costs 4 V bytes a token.
        chunks = zip(
            torch.split(hidden, _LOGIT_ROWS), torch.split(labels, _LOGIT_ROWS), strict=True
        )
        return torch.cat(
            [
                # The head drops nothing, and to keep random numbers is to wait for a GPU.
                checkpoint(score, h, y, use_reentrant=False, preserve_rng_state=False)
                for h, y in chunks
            ]
        )

    def hidden(self, **inputs: Any) -> Tensor:
        """Return the last hidden states `[B, T, H]` of the model's body, fed as transformers does.

        For callers that keep a cache of their own (`clover.language.rows`).
        """
        if self._lean is not None and self._lean.is_usable:
            return self._lean_hidden(self._lean, **inputs)
        states: Tensor = self._body(**{"use_cache": True, **inputs}).last_hidden_state
        return states

    def _lean_hidden(
        self,
        lean: LeanDecoder,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Return the same from our own forward; arguments are transformers'."""
        if inputs_embeds is None:
            assert input_ids is not None, "a pass reads ids or embeddings"
            inputs_embeds = self._embed(input_ids)
        return lean.hidden(
            inputs_embeds,
            mask=attention_mask,
            positions=position_ids,
            cache=past_key_values if use_cache else None,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits `[..., V]` of hidden states `[..., H]`."""
        if self._lean is not None and self._lean.is_usable:
            logits = self._lean.logits(hidden)
        else:
            logits = self._head(hidden).float()
        if self._softcap:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    def _read(self, past: _Past, **inputs: Any) -> Tensor:
        """Run the model behind `past`, whose cache grows; return the last hidden states."""
        with behind(past.shared):
            return self.hidden(
                past_key_values=past.cache, use_cache=past.cache is not None, **inputs
            )

    def _past(self, prefix: Sequence[int], num_rows: int, *, is_kept: bool = True) -> _Past:
        """Return the constant prefix before each of `num_rows` rows, computed once.

        Args:
            prefix: Ids; may be none.
            num_rows: Rows that stand behind it.
            is_kept: Whether what is read next is kept in the cache.
        """
        from transformers import DynamicCache

        fresh = DynamicCache(config=self.model.config) if is_kept else None
        if not prefix:
            return _Past(0, fresh)
        # Device and type are in the key: a model that was moved must not meet its old cache.
        key = (tuple(prefix), self.device, self._embed.weight.dtype)
        if key not in self._prefixes:
            cache = DynamicCache(config=self.model.config)
            # no_grad, not inference_mode: training joins these with tensors that learn.
            is_learning = torch.is_grad_enabled()
            with torch.no_grad():
                ids = torch.tensor([list(prefix)], device=self.device)
                # Not packed for this one pass where the next one learns.
                read = self._body if is_learning else self.hidden
                read(input_ids=ids, past_key_values=cache, use_cache=True)
            while len(self._prefixes) >= _KEPT_PREFIXES:
                self._prefixes.pop(next(iter(self._prefixes)))
            self._prefixes[key] = SharedPrefix.from_cache(cache) if self._is_shared else cache
        found = self._prefixes[key]
        if self._is_shared:
            return _Past(len(prefix), fresh, found)
        return _repeated(_Past(len(prefix), found), num_rows)

    def _read_prompt(
        self, visual: Tensor | None, prompt_ids: Ids, prefix: Sequence[int]
    ) -> tuple[_Past, Tensor | None, Tensor]:
        """Run ``[prefix][visual][pads][prompt]``; return the cache, last hidden state and mask."""
        before = self._past(prefix, len(prompt_ids))
        ids, mask = self._padded(prompt_ids, is_left=True)
        embeds = self._joined((), visual, ids)
        num_cached = before.num_tokens - before.num_shared
        mask = with_ones_before(mask, num_cached + embeds.shape[1])  # [B, cached + Q+T]
        if not embeds.shape[1]:
            return before, None, mask
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, num_cached:] + before.num_shared
        hidden = self._read(
            before, inputs_embeds=embeds, attention_mask=mask, position_ids=positions
        )
        past = replace(before, num_tokens=before.num_tokens + embeds.shape[1])
        return past, hidden[:, -1], mask

    def _begin(
        self, visual: Tensor | None, prompt_ids: Ids, prefix: Sequence[int], max_tokens: int
    ) -> tuple[Tensor, _CachedSteps]:
        self._check_length(visual, prompt_ids, len(prefix), max_tokens)
        past, hidden, mask = self._read_prompt(visual, prompt_ids, prefix)
        assert hidden is not None, "an answer needs at least one visual or prompt token before it"
        return self.logits(hidden), _CachedSteps(self, past, mask)

    def _check_length(
        self, visual: Tensor | None, prompt_ids: Ids, num_prefix: int, max_tokens: int
    ) -> None:
        num_queries = 0 if visual is None else visual.shape[1]
        longest = num_prefix + num_queries + max(map(len, prompt_ids))
        if longest + max_tokens > self.max_positions:
            raise CloverError(
                f"the prompt has {longest} tokens and the answer may have {max_tokens}, together "
                f"more than the model's {self.max_positions}; shorten the prompt or max_tokens"
            )

    def _embedded(
        self, visual: Tensor | None, prompt_ids: Ids, prefix: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        ids, mask = self._padded(prompt_ids, is_left=True)
        embeds = self._joined(prefix, visual, ids)
        return embeds, with_ones_before(mask, embeds.shape[1])


class _CachedSteps:
    """One token a row and step through the model, from a cache."""

    def __init__(self, language: DecoderOnly, past: _Past, mask: Tensor) -> None:
        self.language = language
        self.past = past
        self.mask = mask
        self.position = mask.sum(dim=1) + past.num_shared  # [B]

    def step(self, ids: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        hidden = self.language._read(
            self.past,
            input_ids=ids[:, None],
            attention_mask=self.mask,
            position_ids=self.position[:, None],
        )
        self.position = self.position + 1
        return self.language.logits(hidden[:, -1])

    def keep(self, rows: Tensor) -> None:
        self.past.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self.position = self.position[rows]


def _predicting(
    instruction_ids: Ids, answer_ids: Ids, *, starts: Sequence[int], num_queries: int
) -> list[int]:
    """Return the place of what predicts each answer token [N], among hidden states of all rows.

    Args:
        instruction_ids: B id lists.
        answer_ids: B id lists.
        starts: Where each row begins, with its visual tokens [B].
        num_queries: Visual tokens of a row.
    """
    places: list[int] = []
    for start, instruction, answer in zip(starts, instruction_ids, answer_ids, strict=True):
        first = num_queries + len(instruction) - 1
        assert first >= 0, "an answer needs at least one visual or instruction token before it"
        places += range(start + first, start + first + len(answer))
    return places


def _repeated(past: _Past, num_rows: int) -> _Past:
    """Return a copy of what one row has before it, for `num_rows` rows."""
    copied = copy.deepcopy(past.cache)
    if num_rows > 1:
        copied.batch_repeat_interleave(num_rows)
    return replace(past, cache=copied)
