"""The Q-Former (SPEC, section 1; Li et al. 2023, BLIP-2, section 3.1).

Three passes over shared self-attention weights:

* `encode_queries`: queries look at the image (contrast, and the visual prefix of stage 2).
* `encode_text`: text alone, both directions (contrast).
* `encode_pair`: queries and text see each other and the queries see the image (match, and the
  instruction-aware prefix of stage 2).
* `decode_text`: text sees the queries' cached keys and its own past (caption).

Axes: B batch, Q queries, T text tokens, P image tokens, D width, E encoder width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clover.core.config import QFormerConfig
from clover.core.errors import CloverError
from clover.core.linear import Linear, linear
from clover.qformer.attention import Attention, FeedForward, KeyValue, join_keys
from clover.qformer.image_projection import project_images

_KINDS = 64
"""Kinds of calls of a layer that are compiled; others run as they are."""


@dataclass(frozen=True)
class ImageKeys:
    """Image keys and values of every cross-attention layer, computed once an image.

    The image pass and the matching pass read the same ones: projecting twice would cost twice.
    """

    layers: tuple[KeyValue, ...]

    def select(self, index: Tensor) -> ImageKeys:
        """Return the keys of the images `index` [N], in that order; gradient flows."""
        return ImageKeys(
            tuple(
                (key.index_select(0, index), value.index_select(0, index))
                for key, value in self.layers
            )
        )


@dataclass(frozen=True)
class QueryPass:
    """What the image pass leaves: hidden [B, Q, D] and the self-attention cache of each layer."""

    hidden: Tensor
    cache: tuple[KeyValue, ...]


class Layer(nn.Module):
    """One block: self-attention, cross-attention for queries, one feed-forward for each kind."""

    def __init__(self, config: QFormerConfig, *, has_cross_attention: bool) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        shared = {"num_heads": config.num_heads, "dropout": config.dropout, "eps": eps}
        self.attention = Attention(width, key_width=width, **shared)  # type: ignore[arg-type]
        self.cross_attention = (
            Attention(width, key_width=config.encoder_width, **shared)  # type: ignore[arg-type]
            if has_cross_attention
            else None
        )
        feed_forward = {
            "inner": config.intermediate_size,
            "dropout": config.dropout,
            "eps": eps,
            # Layers that are computed again keep nothing anyway.
            "keeps_gelu": config.checkpoint_activations,
        }
        self.text_feed_forward = FeedForward(width, **feed_forward)  # type: ignore[arg-type]
        self.query_feed_forward = FeedForward(width, **feed_forward)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        *,
        num_queries: int,
        mask: Tensor | None,
        image: KeyValue | None = None,
        past: KeyValue | None = None,
        rows: int | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Run the block.

        Args:
            x: [B, Q + T, D], the first `num_queries` rows are queries.
            num_queries: How many; 0 for text alone.
            mask: Who may look at whom, see `Attention.forward`.
            image: This layer's image keys and values, of B images or of fewer: with B / n images,
                each is asked by n rows in a row.
            past: Cached self-attention keys that come before this call's.
            rows: Compute only the first `rows` outputs: in the last layer nobody reads the rest.

        Returns:
            The block's output, and the self-attention keys and values of this call's rows.
        """
        keys = self.attention.project(x)
        if rows is not None:
            x = x[:, :rows]
            mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., :rows, :]
        x = self.attention(x, join_keys(past, keys), mask)
        if num_queries == 0:
            return self.text_feed_forward(x), keys
        queries = x[:, :num_queries]
        if self.cross_attention is not None:
            assert image is not None, "a layer with cross-attention needs image keys"
            # Rows about one image stand together and ask as one: its keys are never copied.
            together = queries.reshape(image[0].shape[0], -1, queries.shape[-1])
            queries = self.cross_attention(together, image, None).view_as(queries)
        queries = self.query_feed_forward(queries)
        if x.shape[1] == num_queries:
            return queries, keys
        return torch.cat([queries, self.text_feed_forward(x[:, num_queries:])], dim=1), keys


class LanguageHead(nn.Module):
    """BERT's masked-word head, used here to predict the next word (caption loss).

    The decoder is the word embedding itself: it is passed in, so that it cannot come untied.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D], what the decoder multiplies with the word embedding."""
        transformed: Tensor = self.norm(F.gelu(self.dense(hidden)))
        return transformed

    def forward(self, hidden: Tensor, word_embedding: Tensor) -> Tensor:
        """[..., D] and the word embedding [V, D] -> logits [..., V]."""
        return linear(self.transform(hidden), word_embedding, self.bias)


class QFormer(nn.Module):
    """Querying transformer between a frozen image encoder and a frozen language model.

    Args:
        config: Sizes; the defaults of `QFormerConfig` are BLIP-2's.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, width))
        self.word_embedding = nn.Embedding(config.vocab_size, width)
        self.look_up: Callable[[Tensor], Tensor] | None = None
        """Stands for the word embedding inside `used_words.looked_up_once`."""
        self.position_embedding = nn.Embedding(config.max_positions, width)
        self.embedding_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            Layer(config, has_cross_attention=index % config.cross_attention_frequency == 0)
            for index in range(config.num_layers)
        )
        self._call: Callable[..., Any] = _call
        self.initialise()

    def compile_layers(self) -> None:
        """Have layers compiled, once for each kind of pass and shape: the first step takes minutes.

        Only while it learns. Validation meets other shapes, each of which would take a minute.

        Raises:
            CloverError: activations are to be computed again, which is done layer by layer.
        """
        if self.config.checkpoint_activations:
            raise CloverError(
                "compile: true does not go with qformer.checkpoint_activations: true; set one of "
                "them to false"
            )
        # A cross-attention or none, in four passes of which some leave rows out at their end.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, _KINDS)
        # For each shape anew: of changing ones torch 2.11 makes code that its compiler refuses.
        self._call = torch.compile(_call, dynamic=False)

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: each objective has a pass of its own.

        Raises:
            CloverError: always.
        """
        raise CloverError(
            "a QFormer is not called itself; give features to project_image, then call "
            "encode_queries, encode_pair, encode_text or decode_text"
        )

    def initialise(self) -> None:
        """Draw fresh weights: N(0, 0.02), zero biases, unit norms (SPEC, section 1.6)."""
        std = self.config.initializer_range
        nn.init.normal_(self.query_tokens, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)

    def project_image(self, features: Tensor, norm: nn.LayerNorm) -> ImageKeys:
        """Project image tokens to the keys and values of each cross-attention layer.

        Args:
            features: [B, P, E] as the encoder gave them.
            norm: The LayerNorm that stands before the projections.
        """
        crossing = [
            layer.cross_attention
            for layer in self.layers
            if isinstance(layer, Layer) and layer.cross_attention is not None
        ]
        projections = [part for attention in crossing for part in (attention.key, attention.value)]
        found = iter(project_images(features, norm, projections))

        def split(attention: Attention) -> Tensor:
            heads = attention.split(next(found))
            # Head by head, as a processor multiplies them: each pass would copy them so for itself.
            return heads.contiguous() if heads.device.type == "cpu" else heads

        return ImageKeys(tuple((split(attention), split(attention)) for attention in crossing))

    def encode_queries(self, image: ImageKeys) -> QueryPass:
        """Let the queries read the image; text takes no part."""
        batch = image.layers[0][0].shape[0]
        x = self._normed(self.query_tokens.expand(batch, -1, -1))
        hidden, cache = self._run(x, num_queries=x.shape[1], mask=None, image=image)
        return QueryPass(hidden, cache)

    def encode_text(self, ids: Tensor, mask: Tensor, *, first_row: bool = False) -> Tensor:
        """Encode text alone.

        Args:
            ids: [B, T].
            mask: [B, T], 1 = a token, 0 = padding.
            first_row: Return only the `[CLS]` row, which is all the contrast loss reads.

        Returns:
            [B, T, D], or [B, 1, D].
        """
        x = self._normed(self._text(ids))
        keys = mask[:, None, None, :].bool()  # [B, 1, 1, T]
        return self._run(x, num_queries=0, mask=keys, rows=1 if first_row else None)[0]

    def encode_pair(
        self, image: ImageKeys, ids: Tensor, mask: Tensor, *, queries_only: bool = False
    ) -> Tensor:
        """Let queries and text see each other, and the queries see the image.

        Args:
            image: Image keys of the same batch, or of B / n images that n texts each ask about;
                the texts of an image stand together.
            ids: [B, T].
            mask: [B, T], 1 = a token.
            queries_only: Return the query rows alone; the last layer then skips the text rows.

        Returns:
            [B, Q + T, D], or [B, Q, D].
        """
        batch, queries = ids.shape[0], self.config.num_queries
        x = torch.cat([self.query_tokens.expand(batch, -1, -1), self._text(ids)], dim=1)
        keys = torch.cat([mask.new_ones(batch, queries), mask], dim=1)[:, None, None, :].bool()
        rows = queries if queries_only else None
        return self._run(self._normed(x), num_queries=queries, mask=keys, image=image, rows=rows)[0]

    def decode_text(self, ids: Tensor, mask: Tensor, cache: tuple[KeyValue, ...]) -> Tensor:
        """Run text causally behind the queries' cache (SPEC, section 1.5).

        Args:
            ids: [B, T], beginning with `[DEC]`.
            mask: [B, T], 1 = a token.
            cache: From `encode_queries` on the same images; gradient flows into it.

        Returns:
            [B, T, D]: row t has seen the queries and the tokens up to t.
        """
        tokens = ids.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril()
        text = causal[None] & mask[:, None, :].bool()  # [B, T, T]
        queries = text.new_ones(1, 1, 1).expand(ids.shape[0], tokens, cache[0][0].shape[2])
        allowed = torch.cat([queries, text], dim=2)[:, None]  # [B, 1, T, Q + T]
        x = self._normed(self._text(ids))
        return self._run(x, num_queries=0, mask=allowed, past=cache)[0]

    def _text(self, ids: Tensor) -> Tensor:
        # Positions start at 0 also behind queries or a cache (SPEC, section 1.2).
        positions = self.position_embedding.weight[: ids.shape[1]]
        embedded: Tensor = (self.look_up or self.word_embedding)(ids) + positions
        return embedded

    def _normed(self, x: Tensor) -> Tensor:
        return F.dropout(self.embedding_norm(x), self.config.dropout, self.training)

    def _run(
        self,
        x: Tensor,
        *,
        num_queries: int,
        mask: Tensor | None,
        image: ImageKeys | None = None,
        past: tuple[KeyValue, ...] | None = None,
        rows: int | None = None,
    ) -> tuple[Tensor, tuple[KeyValue, ...]]:
        image_layers = iter(image.layers) if image is not None else iter(())
        cache: list[KeyValue] = []
        last = len(self.layers) - 1
        run = _call
        if self.training:
            run = _again if self.config.checkpoint_activations else self._call
        for index, layer in enumerate(self.layers):
            has_image = num_queries > 0 and layer.cross_attention is not None
            x, keys = run(
                layer,
                x,
                num_queries=num_queries,
                mask=mask,
                image=next(image_layers) if has_image else None,
                past=None if past is None else past[index],
                rows=rows if index == last else None,
            )
            cache.append(keys)
        return x, tuple(cache)


def _call(layer: nn.Module, *values: Any, **options: Any) -> Any:
    return layer(*values, **options)


def _again(layer: nn.Module, *values: Any, **options: Any) -> Any:
    """Run a layer whose inside is computed again on the way back, with the same dropout."""
    return checkpoint(layer, *values, use_reentrant=False, **options)
