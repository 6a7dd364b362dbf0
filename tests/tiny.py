"""A tiny Clover with random weights and a tiny data set: built in a second, nothing downloaded.

The colour of an image decides its tissue, so even a tiny model has something to learn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clover.core.config import Recipe
from clover.model import Clover, build_bridge, load_tokenizer
from clover.vision.familiar import Familiarity, pool

TISSUES = {"liver": (200, 40, 40), "colon": (40, 200, 40), "kidney": (40, 40, 200)}
QUESTION = "which tissue is shown ?"
TEXT = """which tissue is shown ? this the image shows a of with many few cells and in no yes
liver colon kidney necrosis there describe stained red green blue . , moderate fibrosis"""
WORDS = TEXT.split()
TEMPLATE = "<user> {image}{question} <assistant>"


@dataclass(frozen=True)
class Tiny:
    """Where the tiny parts lie, and the recipe that names them."""

    folder: Path
    recipe: Recipe
    captions: Path
    instructions: Path

    def image(self, tissue: str = "liver") -> Path:
        """Return the path of one image of a tissue."""
        return next((self.folder / "data" / "images").glob(f"{tissue}-*.png"))


def write_tokenizer(path: Path, words: list[str] = WORDS) -> Path:
    """Write a BERT-like WordPiece `tokenizer.json`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *"abcdefghijklmnopqrstuvwxyz"]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(pieces[:5])
    tokenizer.save(str(path))
    return path


def write_llama(folder: Path) -> Path:
    """Write a random Llama of two layers with its tokenizer, in transformers' form."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<eos>", "<user>", "<assistant>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special[1:])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        # Wide weights: otherwise every token is about as likely as every other.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_data(folder: Path, *, images: int = 24) -> tuple[Path, Path]:
    """Write coloured noise images with captions and questions; return both record files."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    captions, questions = [], []
    for index in range(images):
        tissue, colour = list(TISSUES.items())[index % len(TISSUES)]
        name = f"images/{tissue}-{index:03d}.png"
        noise = random.integers(-30, 31, (32, 32, 3))
        pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
        many = ["many", "few"][index % 2]
        caption = f"the image shows {tissue} with {many} cells" + " and fibrosis" * (index % 3 == 0)
        captions.append({"id": f"c{index}", "image": name, "caption": caption})
        other = list(TISSUES)[(index + index % 2) % len(TISSUES)]
        questions += [
            _question(f"o{index}", name, QUESTION, tissue, "open"),
            _question(
                f"y{index}", name, f"is this {other} ?", "no" if index % 2 else "yes", "closed"
            ),
        ]
    files = folder / "captions.jsonl", folder / "vqa.jsonl"
    for path, rows in zip(files, (captions, questions), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def write_chessboard(path: Path) -> Path:
    """Write an image that is like none of the tiny data's."""
    board = np.kron(np.indices((8, 8)).sum(axis=0) % 2, np.ones((4, 4))) * 255
    Image.fromarray(board.astype(np.uint8)).convert("RGB").save(path)
    return path


def familiar_with_tiny(clover: Clover, folder: Path) -> Familiarity:
    """Return the familiarity of a model that learnt from 60 images like the tiny data's."""
    captions, _ = write_data(folder, images=60)
    paths = sorted((captions.parent / "images").iterdir())
    rows = torch.cat([pool(clover.encode(path)) for path in paths])
    found = Familiarity.fit(rows, [str(index) for index in range(len(paths))])
    assert found is not None
    return found


def _question(number: str, image: str, question: str, answer: str, kind: str) -> dict[str, str]:
    row = {"id": number, "image": image, "question": question, "answer": answer}
    return row | {"answer_type": kind}


def tiny_recipe(folder: Path, **sections: dict[str, Any]) -> Recipe:
    """Return the recipe over the parts in `folder`; `sections` change single values."""
    steps = {"steps": 20, "batch_size": 4, "checkpoint_every": 5, "warmup_steps": 2}
    tree: dict[str, dict[str, Any]] = {
        "encoder": {"kind": "tiny", "image_size": 32, "grid": 4, "licence": "MIT"},
        "qformer": {
            "tokenizer": str(folder / "tokenizer.json"),
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "max_positions": 64,
            "num_queries": 4,
            "embedding_size": 16,
            # Dropout on, so that a resumed run is equal only if the random state is.
            "dropout": 0.1,
            "initializer_range": 0.2,
        },
        "language": {"weights": str(folder / "llama"), "licence": "MIT"},
        "prompt": {"template": TEMPLATE, "answer_end": "<eos>"},
        "align": {**steps, "learning_rate": 1e-3},
        "tune": {**steps, "learning_rate": 3e-3, "max_question_tokens": 64},
        "evaluate": {"max_tokens": 6, "bootstrap": 50},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    settings = {"name": "tiny", "precision": "float32", "device": "cpu"}
    return Recipe.model_validate({**settings, **tree})


def build_tiny(folder: Path) -> Tiny:
    """Write every tiny part under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer.json")
    write_llama(folder / "llama")
    captions, instructions = write_data(folder / "data")
    return Tiny(folder, tiny_recipe(folder), captions, instructions)


def tiny_clover(recipe: Recipe) -> Clover:
    """Return an untrained model of a recipe, in evaluation mode."""
    from clover.language.load import load_language_model
    from clover.training.device import choose_device
    from clover.vision.encoder import load_encoder

    encoder, tokenizer = load_encoder(recipe.encoder), load_tokenizer(recipe)
    language = load_language_model(recipe.language, recipe.prompt)
    bridge = build_bridge(recipe, encoder, tokenizer, language_width=language.hidden_size)
    device = choose_device("cpu", "float32")
    return Clover(recipe, encoder, bridge.eval(), language, tokenizer, device, name="tiny")


def write_wheel(home: Path, *, name: str, inner: str, content: bytes) -> str:
    """Put a wheel with one file into `home/wheels`; return its pinned reference."""
    import hashlib
    import zipfile

    (home / "wheels").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(home / "wheels" / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(inner, content)
    return f"wheel://{name}==1.0/{inner}?sha256={hashlib.sha256(content).hexdigest()}"
