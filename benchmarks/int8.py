"""Fewer bits for the frozen language model: a trained model's questions, each number format.

    python -m benchmarks.int8 MODEL --data vqa_val.jsonl --images DIR --count 200

Every format reads the same visual tokens, question and prompt, at the language model's full depth.
Prints, of each format against float32 and bfloat16: how far the first answer token's logits
are apart (norm of the difference to norm), how often the likeliest first token and the whole greedy
answer are the same, the loss of the true answer, the bytes of the weights. What is not installed
(`bnb-*`: extra `[bits]`) is left out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import clover
from benchmarks.figure import print_figure
from clover.core.errors import CloverError
from clover.core.record import read_records
from clover.language.load import load_language_model

FORMATS = {
    "float32": ("none", torch.float32),
    "bfloat16": ("none", torch.bfloat16),
    "int8": ("int8", torch.float32),
    "int8 over bfloat16": ("int8", torch.bfloat16),
    "bnb-8bit": ("bnb-8bit", torch.float32),
    "bnb-4bit": ("bnb-4bit", torch.float32),
}
_BATCH = 20


@dataclass
class Found:
    """What a format said."""

    logits: Tensor
    texts: list[str]
    loss: float
    size: int


def main() -> None:
    """Load each format in turn, ask all questions, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    model = clover.load(options.model, device="cpu", precision="float32")
    records = read_records(options.data, needs="question").records
    step = max(1, len(records) // options.count)
    records = records[::step][: options.count]
    folder = options.images or options.data.parent
    questions = [model.question_of(record) for record in records]
    answers = [record.answer or "" for record in records]
    with torch.no_grad():
        prefixes = torch.cat(
            [
                model.visual_prefix(model.encode(folder / str(record.image)), [question])
                for record, question in zip(records, questions, strict=True)
            ]
        )
    found: dict[str, Found] = {}
    for name in FORMATS:
        try:
            found[name] = ask(model, name, prefixes, questions, answers)
        except CloverError as error:
            print(f"{name}: {error}")
            continue
        report(found, name, model, len(records))


def ask(
    model: clover.Clover, name: str, prefixes: Tensor, questions: list[str], answers: list[str]
) -> Found:
    """Load the language model in one format and ask it everything."""
    quantise, dtype = FORMATS[name]
    config = model.recipe.language.model_copy(update={"quantise": quantise})
    language = load_language_model(config, model.recipe.prompt, dtype=dtype)
    settings = model.default_settings()
    logits, texts, loss, tokens = [], [], 0.0, 0
    for start in range(0, len(questions), _BATCH):
        rows = slice(start, start + _BATCH)
        ids = [language.instruction_ids(text) for text in questions[rows]]
        with torch.no_grad():
            begun, _ = language._begin(prefixes[rows], ids, language.prefix_ids, 1)
            total, count = language.loss(prefixes[rows], questions[rows], answers[rows])
        logits.append(begun.float())
        texts += language.generate(prefixes[rows], questions[rows], settings)
        loss, tokens = loss + float(total), tokens + int(count)
    items = {id(i): i for i in (*language.model.parameters(), *language.model.buffers())}
    size = sum(item.numel() * item.element_size() for item in items.values())
    return Found(torch.cat(logits), texts, loss / tokens, size)


def report(found: dict[str, Found], name: str, model: clover.Clover, count: int) -> None:
    """Print a format's figures against the two plain ones."""
    new = found[name]
    details = {"format": name, "questions": count, "model": model.name}
    print_figure("format_loss", new.loss, "nats a token", **details)
    print_figure("format_bytes", new.size / found["float32"].size, "of float32", **details)
    for peer in ("float32", "bfloat16"):
        if peer == name or peer not in found:
            continue
        old, more = found[peer], {**details, "peer": peer}
        apart = float((new.logits - old.logits).norm() / old.logits.norm())
        print_figure("format_logits_apart", apart, "share", **more)
        same = float((new.logits.argmax(-1) == old.logits.argmax(-1)).float().mean())
        print_figure("format_same_first_token", 100 * same, "%", **more)
        equal = sum(a == b for a, b in zip(new.texts, old.texts, strict=True))
        print_figure("format_same_answer", 100 * equal / len(new.texts), "%", **more)


if __name__ == "__main__":
    main()
