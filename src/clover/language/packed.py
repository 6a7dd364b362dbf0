"""Rows of a batch one after another in one sequence, each of which attends to itself alone.

In: queries, keys and values of all tokens of all rows, as a frozen model's layer computes them for
one row of `N` tokens. Out: attention as if each row had been read alone. Everything else in a layer
looks at one token at a time, so nothing is padded and each weight is read once a batch; what
crosses between tokens is here, row by row. Nothing of N x N is ever made.

For learning on a CPU: a device reads a padded batch by fused kernels.

Axes: N tokens of all rows, T of one, L of the longest; K key heads, G query heads of a key head, D
width of a head, P tokens of a shared beginning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from clover.core.number_format import without_autocast

FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox"}
"""Whose layers let tokens meet in attention alone, behind the mask that transformers makes: proved
for each in `tests/language/test_packed.py`. Others are read padded."""
FIXED_ROTATIONS = {"default", "linear", "llama3"}
"""Rotary angles that do not change with the length of the text."""


class PackedRows:
    """Where each row of a sequence begins.

    Args:
        lengths: Tokens of each row, at least one; their sum is N.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        assert lengths and min(lengths) > 0, "a row needs a token"
        self.longest = max(lengths)
        self.starts: list[int] = []
        """First token of each row."""
        start = 0
        for length in lengths:
            self.starts.append(start)
            start += length
        self.bounds = list(zip(self.starts, [*self.starts[1:], start], strict=True))
        """First token of each row, and of what follows it."""
        self.places = torch.cat([torch.arange(length) for length in lengths])
        """`[N]`: the place of each token in its row."""
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def mask(
        self, together: int, before: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> Tensor:
        """Return `[1, L G, P + L]`, added to scores: -inf where a token of a row would look ahead.

        A shorter row's is its upper part, and what begins it.

        Args:
            together: Query heads of a key head, G.
            before: Keys and values of the shared beginning, or none.
            dtype: Of the scores.
        """
        num_before = 0 if before is None else before[0].shape[1]
        form = (together, num_before, dtype)
        if form not in self._masks:
            ahead = torch.full((self.longest, num_before + self.longest), -torch.inf, dtype=dtype)
            mask = ahead.triu(num_before + 1).repeat_interleave(together, dim=0)
            self._masks[form] = mask[None]
        return self._masks[form]


_ACTIVE: ContextVar[PackedRows | None] = ContextVar("packed_rows", default=None)


@contextlib.contextmanager
def packed(rows: PackedRows | None) -> Iterator[None]:
    """Let models prepared by `share_prefix` read one sequence as these rows."""
    token = _ACTIVE.set(rows)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_rows() -> PackedRows | None:
    """Return the rows that the sequence read now consists of; none where it is a padded batch."""
    return _ACTIVE.get()


def reads_token_by_token(model: Any) -> bool:
    """Return whether nothing but attention to all that is before crosses from token to token."""
    config, body = model.config, model.base_model
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    rotation = getattr(getattr(body, "rotary_emb", None), "rope_type", None)
    crosses = (nn.Conv1d, nn.RNNBase)
    return (
        config.model_type in FAMILIES
        and kinds == {"full_attention"}
        and getattr(config, "is_causal", True)
        and isinstance(rotation, str)
        and rotation in FIXED_ROTATIONS
        and not any(isinstance(module, crosses) for module in body.modules())
    )


class _Attend(Function):
    @staticmethod
    def forward(
        context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        before: tuple[Tensor, Tensor] | None,
        rows: PackedRows,
        scale: float,
    ) -> Tensor:
        _, heads, length, width = query.shape
        key, value = key[0], value[0]  # [K, N, D]
        groups = key.shape[0]
        together = heads // groups
        # A row's queries lie together, those of one token's heads side by side.
        asked = query[0].view(groups, together, length, width).transpose(1, 2)
        asked = asked.reshape(groups, length * together, width)  # [K, N G, D]
        mask = rows.mask(together, before, asked.dtype)
        read = torch.empty_like(asked)
        kept = []
        with without_autocast(query.device):
            for start, end in rows.bounds:
                mine = slice(start * together, end * together)
                keys, values = _seen(key, value, before, start, end)  # [K, P + T, D]
                hidden = mask[:, : (end - start) * together, : keys.shape[1]]
                scores = torch.baddbmm(hidden, asked[:, mine], keys.transpose(1, 2), alpha=scale)
                kept.append(scores.softmax(dim=-1))  # [K, T G, P + T]
                read[:, mine] = torch.bmm(kept[-1], values)
        context.save_for_backward(asked, key, value, *kept)
        context.before, context.rows, context.scale = before, rows, scale
        by_token = read.view(groups, length, together, width).transpose(0, 1)
        return by_token.reshape(1, length, heads, width)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        asked, key, value, *kept = context.saved_tensors
        before, rows, scale = context.before, context.rows, context.scale
        groups, length, width = key.shape
        together = asked.shape[1] // length
        num_before = 0 if before is None else before[0].shape[1]
        slope = grad[0].view(length, groups, together, width).transpose(0, 1)  # [K, N, G, D]
        slope = slope.reshape(asked.shape)
        of_query = torch.empty_like(asked)
        of_key, of_value = (item.new_empty(item.shape) for item in (key, value))
        with without_autocast(grad.device):
            for (start, end), weights in zip(rows.bounds, kept, strict=True):
                mine = slice(start * together, end * together)
                keys, values = _seen(key, value, before, start, end)
                asks, wants = asked[:, mine], slope[:, mine]
                of_weights = torch.bmm(wants, values.transpose(1, 2))
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                of_query[:, mine] = torch.bmm(of_scores, keys)
                # Nothing learns before the rows.
                own, seen = of_scores[..., num_before:], weights[..., num_before:]
                of_key[:, start:end] = torch.bmm(own.transpose(1, 2), asks)
                of_value[:, start:end] = torch.bmm(seen.transpose(1, 2), wants)
        of_query = of_query.view(groups, length, together, width).transpose(1, 2)
        of_query = of_query.reshape(1, groups * together, length, width)
        return of_query.mul_(scale), of_key.mul_(scale)[None], of_value[None], None, None, None


def _seen(
    key: Tensor, value: Tensor, before: tuple[Tensor, Tensor] | None, start: int, end: int
) -> tuple[Tensor, Tensor]:
    """Return keys and values `[K, P + T, D]` of the row of these tokens and of what is before."""
    own = key[:, start:end], value[:, start:end]
    if before is None:
        return own[0].contiguous(), own[1].contiguous()
    return torch.cat([before[0], own[0]], dim=1), torch.cat([before[1], own[1]], dim=1)


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rows: PackedRows,
    before: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend `[1, K G, N, D]` to `[1, K, N, D]`, each row to what is before it in itself.

    Args:
        query: `[1, K G, N, D]`.
        key: `[1, K, N, D]`.
        value: `[1, K, N, D]`.
        rows: What the N tokens are.
        before: Keys and values `[K, P, D]` that stand before each row; no gradient flows into them.
        scale: Of the scores; 1 / sqrt(D) where absent.

    Returns:
        `[1, N, K G, D]`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    read: Tensor = _Attend.apply(query, key, value, before, rows, scale)
    return read
