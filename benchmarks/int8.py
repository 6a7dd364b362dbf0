"""Eight bits against full numbers: the phantom's language model on answers it has never seen.

    python -m benchmarks.int8

Prints the relative error of all logits, the loss an answer token of both, how often the likeliest
next token is the same, and the bytes of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.figure import print_figure
from clover.core.config import load_recipe
from clover.language.decoder_only import DecoderOnly
from clover.language.load import load_language_model

QUESTIONS = ["Is there necrosis?", "What tissue is shown?", "Describe the image."]
ANSWERS = ["no", "colon", "Sheets of tumour cells with large nuclei lie in a fibrous stroma."]


def main() -> None:
    """Load both, compare."""
    recipe = load_recipe("phantom")
    torch.manual_seed(0)
    found: list[tuple[Tensor, float, int]] = []
    for quantise in ("none", "int8"):
        config = recipe.language.model_copy(update={"quantise": quantise})
        language = load_language_model(config, recipe.prompt)
        assert isinstance(language, DecoderOnly)
        ids = torch.tensor([language.tokens.encode(" ".join(ANSWERS))])
        with torch.no_grad():
            logits = language.logits_from_ids(None, ids, torch.ones_like(ids))
            total, count = language.loss(None, QUESTIONS, ANSWERS)
        items = {id(i): i for i in (*language.model.parameters(), *language.model.buffers())}
        size = sum(item.numel() * item.element_size() for item in items.values())
        found.append((logits, float(total / count), size))
    (full, loss, size), (small, small_loss, small_size) = found
    peer = {"peer": "float32", "model": "SmolLM2-135M-Instruct"}
    print_figure("int8_logits_error", float((small - full).norm() / full.norm()), "share", **peer)
    same = float((small.argmax(-1) == full.argmax(-1)).float().mean())
    print_figure("int8_same_next_token", 100 * same, "%", **peer)
    print_figure("int8_loss_difference", small_loss - loss, "nats a token", loss=loss, **peer)
    print_figure("int8_bytes", small_size / size, "of float32", **peer)


if __name__ == "__main__":
    main()
