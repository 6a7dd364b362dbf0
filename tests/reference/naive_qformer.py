"""The Q-Former and its three losses, written from SPEC sections 1 and 2 to be read, not to be fast.

One sample at a time, one head at a time, explicit softmax, additive -10000 masks, and for the
caption one pass over `[queries ; text]` with a UniLM mask instead of a cache. It shares nothing
with the fast code but the names of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MASKED = -10000.0


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    normed = (x - mean) / torch.sqrt(variance + eps)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def softmax(row: Tensor) -> Tensor:
    powers = torch.exp(row - row.max())
    return powers / powers.sum()


def log_softmax(row: Tensor) -> Tensor:
    return row - row.max() - torch.log(torch.exp(row - row.max()).sum())


def cross_entropy(logits: Tensor, target: int, smoothing: float) -> Tensor:
    """(1 - s) of the mass on the target, s spread over all classes, the target's share included."""
    scores = log_softmax(logits)
    return -(1 - smoothing) * scores[target] - smoothing * scores.mean()


@dataclass
class Naive:
    """The Q-Former's weights by our names (without `qformer.`), and its sizes."""

    weights: dict[str, Tensor]
    num_layers: int
    num_heads: int
    num_queries: int
    frequency: int
    eps: float = 1e-12

    def attention(self, rows: Tensor, keys: Tensor, name: str, mask: Tensor) -> Tensor:
        """`rows` [R, D] look at `keys` [K, .]; `mask` [R, K] is added to the scores."""
        query = linear(rows, self.weights, f"{name}.query")
        key = linear(keys, self.weights, f"{name}.key")
        value = linear(keys, self.weights, f"{name}.value")
        size = query.shape[1] // self.num_heads
        context = []
        for head in range(self.num_heads):
            part = slice(head * size, (head + 1) * size)
            looked = []
            for row in range(len(rows)):
                scores = key[:, part] @ query[row, part] / math.sqrt(size) + mask[row]
                looked.append(softmax(scores) @ value[:, part])
            context.append(torch.stack(looked))
        update = linear(torch.cat(context, dim=1), self.weights, f"{name}.output")
        return layer_norm(rows + update, self.weights, f"{name}.norm", self.eps)

    def feed_forward(self, rows: Tensor, name: str) -> Tensor:
        inner = gelu(linear(rows, self.weights, f"{name}.inner"))
        update = linear(inner, self.weights, f"{name}.outer")
        return layer_norm(rows + update, self.weights, f"{name}.norm", self.eps)

    def run(self, mask: Tensor, *, image: Tensor | None, ids: Tensor | None) -> Tensor:
        """Run `[queries ; text]`: queries when there is an image, text when there are ids.

        Args:
            mask: [R, R], 0 where a row may look, -10000 where not.
            image: [P, E] after the norm of image tokens.
            ids: [T].
        """
        parts = []
        if image is not None:
            parts.append(self.weights["query_tokens"][0])
        if ids is not None:
            words = self.weights["word_embedding.weight"][ids]
            parts.append(words + self.weights["position_embedding.weight"][: len(ids)])
        rows = layer_norm(torch.cat(parts), self.weights, "embedding_norm", self.eps)
        count = self.num_queries if image is not None else 0
        for index in range(self.num_layers):
            name = f"layers.{index}"
            rows = self.attention(rows, rows, f"{name}.attention", mask)
            done = []
            if image is not None:
                queries = rows[:count]
                if index % self.frequency == 0:
                    all_open = torch.zeros(count, len(image), dtype=rows.dtype)
                    queries = self.attention(queries, image, f"{name}.cross_attention", all_open)
                done.append(self.feed_forward(queries, f"{name}.query_feed_forward"))
            if ids is not None:
                done.append(self.feed_forward(rows[count:], f"{name}.text_feed_forward"))
            rows = torch.cat(done)
        return rows

    def queries_alone(self, image: Tensor) -> Tensor:
        mask = torch.zeros(self.num_queries, self.num_queries, dtype=image.dtype)
        return self.run(mask, image=image, ids=None)

    def text_alone(self, ids: Tensor, attention: Tensor) -> Tensor:
        mask = self.key_mask(attention).expand(len(ids), -1)
        return self.run(mask, image=None, ids=ids)

    def pair(self, image: Tensor, ids: Tensor, attention: Tensor) -> Tensor:
        open_queries = torch.zeros(self.num_queries, dtype=image.dtype)
        keys = torch.cat([open_queries, self.key_mask(attention)])
        return self.run(keys.expand(len(keys), -1), image=image, ids=ids)

    def caption(self, image: Tensor, ids: Tensor, attention: Tensor) -> Tensor:
        """Return text rows [T, D] under the UniLM mask: queries see queries, text its past."""
        queries, tokens = self.num_queries, len(ids)
        mask = torch.zeros(queries + tokens, queries + tokens, dtype=image.dtype)
        for row in range(queries + tokens):
            for key in range(queries + tokens):
                if row < queries:
                    is_open = key < queries
                else:
                    is_past = queries <= key <= row and bool(attention[key - queries])
                    is_open = key < queries or is_past
                mask[row, key] = 0 if is_open else MASKED
        return self.run(mask, image=image, ids=ids)[queries:]

    def key_mask(self, attention: Tensor) -> Tensor:
        dtype = self.weights["query_tokens"].dtype
        return torch.tensor([0.0 if seen else MASKED for seen in attention.tolist()], dtype=dtype)


@dataclass(frozen=True)
class NaiveLosses:
    contrast: Tensor
    match: Tensor
    caption: Tensor
    image_to_text: Tensor
    text_to_image: Tensor

    @property
    def total(self) -> Tensor:
        return self.contrast + self.match + self.caption


def unit(vector: Tensor) -> Tensor:
    return vector / torch.sqrt((vector**2).sum())


def naive_losses(
    naive: Naive,
    heads: dict[str, Tensor],
    images: list[Tensor],
    texts: list[tuple[Tensor, Tensor]],
    *,
    negatives: tuple[list[int], list[int]],
    decode_start: int,
    smoothing: float,
) -> NaiveLosses:
    """Return the three losses of B pairs.

    Args:
        naive: The Q-Former.
        heads: The alignment heads' weights.
        images: B tensors [P, E], after the norm of image tokens.
        texts: B pairs of ids [T] and attention mask [T].
        negatives: An image for each text, then a text for each image.
        decode_start: Id of `[DEC]`.
        smoothing: Of contrast and caption.
    """
    size = len(images)
    passes = [naive.queries_alone(image) for image in images]
    image_vectors = [
        [unit(row) for row in linear(rows, heads, "vision_projection")] for rows in passes
    ]
    text_vectors = [
        unit(linear(naive.text_alone(*text)[0], heads, "text_projection")) for text in texts
    ]
    best = [
        [torch.stack([query @ text for query in queries]).max() for text in text_vectors]
        for queries in image_vectors
    ]
    to_text = torch.stack([torch.stack(row) for row in best]) / heads["temperature"]
    to_image = torch.stack([torch.stack(column) for column in zip(*best, strict=True)])
    to_image = to_image / heads["temperature"]
    contrast = sum(
        cross_entropy(to_text[i], i, smoothing) + cross_entropy(to_image[i], i, smoothing)
        for i in range(size)
    ) / (2 * size)

    image_for_text, text_for_image = negatives
    pairs = [(i, i, 1) for i in range(size)]
    pairs += [(image_for_text[i], i, 0) for i in range(size)]
    pairs += [(i, text_for_image[i], 0) for i in range(size)]
    match = torch.zeros((), dtype=to_text.dtype)
    for image, text, label in pairs:
        rows = naive.pair(images[image], *texts[text])[: naive.num_queries]
        logits = torch.stack([linear(row, heads, "matching") for row in rows]).mean(dim=0)
        match = match + cross_entropy(logits, label, 0.0) / len(pairs)

    terms = []
    for image, (ids, attention) in zip(images, texts, strict=True):
        inputs = ids.clone()
        inputs[0] = decode_start
        rows = naive.caption(image, inputs, attention)
        for place in range(len(ids) - 1):
            if attention[place + 1]:
                hidden = gelu(linear(rows[place], heads, "language.dense"))
                hidden = layer_norm(hidden, heads, "language.norm", naive.eps)
                words = naive.weights["word_embedding.weight"]
                logits = words @ hidden + heads["language.bias"]
                terms.append(cross_entropy(logits, int(inputs[place + 1]), smoothing))
    caption = torch.stack(terms).mean()
    return NaiveLosses(contrast, match, caption, to_text, to_image)
