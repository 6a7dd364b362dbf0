"""Seconds of a training step at the phantom's size, beside the naive ways of the same mathematics.

Stage 1: all passes shared, vocabulary loss in blocks, against the published code's four separate
passes (image keys projected for each, every text row and every logit computed).
Stage 2: constant prompt cached and answer-only logits, against one plain forward with all logits.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.figure import alternating, print_figure
from benchmarks.naive import torch_operations
from clover.align.apart import backward_apart
from clover.align.caption import caption_inputs
from clover.align.contrast import contrastive_loss, similarity
from clover.align.losses import LossSettings
from clover.align.match import matching_loss, sample_negatives
from clover.core.config import load_recipe
from clover.model import build_bridge, load_frozen_language, load_tokenizer
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import Tokens
from clover.training.device import choose_device
from clover.vision.encoder import load_encoder

CAPTION = (
    "H&E-stained section of smooth muscle with fibrosis, lymphoid inflammation, several mitoses "
    "and necrosis; a moderate cell number. No sign of nuclear atypia is present."
)


def separate_passes(
    bridge: Bridge,
    features: torch.Tensor,
    text: Tokens,
    start: int,
    *,
    keep_gradients: bool = False,
) -> None:
    """Run one stage-1 step the published way, and its backward."""
    qformer, heads = bridge.qformer, bridge.alignment
    image_pass = qformer.encode_queries(bridge.read_image(features))
    rows = qformer.encode_text(text.ids, text.mask)
    similar = similarity(
        heads.embed_image(image_pass.hidden), heads.embed_text(rows[:, 0]), heads.temperature
    )
    negatives = sample_negatives(similar)
    own = torch.arange(len(features), device=features.device)
    images = torch.cat([own, negatives.image_for_text, own])
    texts = torch.cat([own, own, negatives.text_for_image])
    pair = qformer.encode_pair(
        bridge.read_image(features[images]), text.ids[texts], text.mask[texts]
    )
    inputs = caption_inputs(text.ids, decode_start=start)
    hidden = qformer.decode_text(inputs, text.mask, image_pass.cache)
    logits = heads.language(hidden, qformer.word_embedding.weight)
    labels = inputs[:, 1:].masked_fill(text.mask[:, 1:] == 0, -100)
    caption = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    queries = pair[:, : bridge.config.num_queries]
    loss = contrastive_loss(similar, label_smoothing=0.1) + matching_loss(heads.match(queries))
    (loss + caption).backward()
    if not keep_gradients:
        bridge.zero_grad(set_to_none=True)


def main() -> None:
    """Print median seconds of both ways and their ratio, for each stage."""
    recipe = load_recipe("phantom")
    device = choose_device(recipe.device, recipe.precision)
    encoder, tokenizer = load_encoder(recipe.encoder), load_tokenizer(recipe)
    torch.manual_seed(0)
    batch = recipe.align.batch_size
    features = torch.randn(batch, encoder.num_tokens, encoder.width)
    text = tokenizer([CAPTION] * batch, limit=recipe.align.max_text_tokens)
    bridge = build_bridge(recipe, encoder, tokenizer, has_alignment=True)

    def ours() -> None:
        with device.autocast():
            backward_apart(bridge, features, text, LossSettings(tokenizer.decode_start))
        bridge.zero_grad(set_to_none=True)

    def peer() -> None:
        with device.autocast(), torch_operations():
            separate_passes(bridge, features, text, tokenizer.decode_start)

    fast, slow = alternating([ours, peer])
    print_figure("stage-1 step", fast, "s", batch=batch, naive=round(slow, 3), ratio=slow / fast)
    _tune(recipe.tune.batch_size)


def _tune(batch: int) -> None:
    recipe = load_recipe("phantom")
    device = choose_device(recipe.device, recipe.precision)
    language = load_frozen_language(recipe.language, recipe.prompt, device)
    queries = recipe.qformer.num_queries
    visual = torch.randn(batch, queries, language.hidden_size, requires_grad=True)
    questions = ["Is there necrosis in this image?"] * batch
    answers = ["yes"] * batch
    model, tokens = language.model, language.tokens  # type: ignore[attr-defined]
    before, after = language.prompt.split(questions[0])  # type: ignore[attr-defined]
    head = torch.tensor([tokens.encode(before)] * batch)
    tail = torch.tensor([[*tokens.encode(after + answers[0]), tokens.end_id]] * batch)

    def ours() -> None:
        with device.autocast():
            total, _ = language.loss(visual, questions, answers)
        total.backward()  # type: ignore[no-untyped-call]

    def peer() -> None:
        embed = model.get_input_embeddings()
        with device.autocast():
            embeds = torch.cat([embed(head), visual, embed(tail)], dim=1)
            logits = model(inputs_embeds=embeds).logits.float()
        loss = F.cross_entropy(logits[:, -3:-1].flatten(0, 1), tail[:, -2:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]

    fast, slow = alternating([ours, peer])
    print_figure("stage-2 step", fast, "s", batch=batch, naive=round(slow, 3), ratio=slow / fast)


if __name__ == "__main__":
    main()
