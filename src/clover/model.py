"""Clover = image encoder + bridge (Q-Former) + language model + prompt.

`load(path)` gives a model one can ask; `build(recipe)` gives the parts that training puts together.
Only the bridge is ever written: frozen weights are named by reference and hash, never copied.

Research use only, not for diagnosis.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clover import __version__
from clover.core.assets import resolve
from clover.core.config import LanguageConfig, PromptConfig, Recipe, explain_error
from clover.core.errors import CloverError
from clover.core.files import atomic_path, read_json, sha256_file, write_json, write_text
from clover.core.record import Record
from clover.language.load import load_language_model
from clover.language.prompt import Prompt
from clover.language.protocol import GenerationSettings, LanguageModel
from clover.qformer.bridge import Bridge
from clover.qformer.initialise import start_from_bert
from clover.qformer.tokenizer import TextTokenizer, Tokens
from clover.training.device import Device, choose_device
from clover.vision.encoder import ImageEncoder, load_encoder

ImageLike: TypeAlias = "str | Path | bytes | Image.Image"
NOTICE = "Research use only, not for diagnosis."
_FORMAT = 1


@lru_cache(maxsize=2)
def load_frozen_language(
    config: LanguageConfig, prompt: PromptConfig, device: Device
) -> LanguageModel:
    """Load a frozen language model once a process: stages that follow each other share it."""
    return load_language_model(config, prompt, device=device.device, dtype=device.dtype)


@dataclass(frozen=True)
class Answer:
    """What `Clover.ask` returns."""

    text: str
    model: str
    seconds: float
    notice: str = NOTICE

    def __str__(self) -> str:
        """Return the answer's text."""
        return self.text


def load_tokenizer(recipe: Recipe) -> TextTokenizer:
    """Load the Q-Former's tokenizer that a recipe names."""
    if recipe.qformer.tokenizer is None:
        raise CloverError(
            f"recipe {recipe.name}: qformer.tokenizer names no tokenizer.json; "
            "take the one that belongs to qformer.weights"
        )
    return TextTokenizer(resolve(recipe.qformer.tokenizer))


def build_bridge(
    recipe: Recipe,
    encoder: ImageEncoder,
    tokenizer: TextTokenizer,
    *,
    language_width: int | None = None,
    has_alignment: bool = False,
) -> Bridge:
    """Build a bridge of the recipe's size, started from its BERT checkpoint where one is named."""
    config = recipe.qformer.model_copy(
        update={"encoder_width": encoder.width, "vocab_size": tokenizer.vocab_size}
    )
    torch.manual_seed(recipe.seed)
    bridge = Bridge(
        config,
        language_width=language_width,
        has_alignment=has_alignment,
        temperature=recipe.align.temperature,
    )
    if recipe.qformer.weights is not None:
        start_from_bert(bridge, resolve(recipe.qformer.weights))
    return bridge


@dataclass
class Clover:
    """A model that answers questions about an image.

    Attributes:
        recipe: What it was made from.
        encoder: Frozen.
        bridge: What was trained.
        language: Frozen.
        tokenizer: Of the Q-Former.
        device: Where the bridge runs.
        name: Shown with every answer.
        details: Further entries of the model folder's `config.json`.
    """

    recipe: Recipe
    encoder: ImageEncoder
    bridge: Bridge
    language: LanguageModel
    tokenizer: TextTokenizer
    device: Device
    name: str = "clover"
    details: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def prompt(self) -> Prompt:
        """How image and question are put, in training and here alike."""
        return Prompt.from_config(self.recipe.prompt)

    def question_of(self, record: Record) -> str:
        """Return a record's question as it is put: a closed one carries the prompt's suffix."""
        is_closed = record.answer_type == "closed"
        return self.prompt.question(record.question or "", is_closed=is_closed)

    def question_tokens(self, questions: Sequence[str]) -> Tokens | None:
        """Return what the Q-Former reads of the questions; None when it does not read them."""
        if not self.recipe.tune.instruction_aware:
            return None
        tokens = self.tokenizer(questions, limit=self.recipe.tune.max_question_tokens, side="left")
        return Tokens(tokens.ids.to(self.device.device), tokens.mask.to(self.device.device))

    def visual_hidden(self, features: Tensor, questions: Sequence[str]) -> Tensor:
        """Return the query rows [B, Q, D] before the projection; see `visual_prefix`.

        A Q-Former that does not read the question still gives a row a question.
        """
        image = self.bridge.read_image(features.to(self.device.device))
        tokens = self.question_tokens(questions)
        if tokens is not None:
            return self.bridge.visual_hidden(image, tokens.ids, tokens.mask)
        hidden = self.bridge.visual_hidden(image)
        return hidden.repeat_interleave(len(questions) // len(hidden), dim=0)

    def visual_prefix(self, features: Tensor, questions: Sequence[str]) -> Tensor:
        """Return what the language model sees [B, Q, H] of image tokens and B questions.

        Args:
            features: [B, P, E], or [G, P, E] where G divides B: then the first B / G questions
                are about the first image, and so on, and an image's keys are computed once.
            questions: B questions.
        """
        return self.bridge.project(self.visual_hidden(features, questions))

    def loss(
        self, features: Tensor, questions: Sequence[str], answers: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return summed answer-token loss and token count of B samples (SPEC, section 4)."""
        return self.language.loss(self.visual_prefix(features, questions), questions, answers)

    @torch.no_grad()
    def answer_features(
        self,
        features: Tensor,
        questions: Sequence[str],
        settings: GenerationSettings,
        *,
        choices: Sequence[Sequence[str] | None] | None = None,
    ) -> list[str]:
        """Answer B questions about B images given as encoder tokens [B, P, E].

        A question with `choices` is answered with the likeliest of these.
        """
        self.bridge.eval()
        with self.device.autocast():
            prefix = self.visual_prefix(features, questions)
            return self.language.generate(prefix, questions, settings, choices=choices)

    def encode(self, image: ImageLike) -> Tensor:
        """Return one image's tokens [1, P, E]."""
        return self.encoder.encode(self.encoder.prepare(open_image(image))[None]).float()

    def default_settings(self) -> GenerationSettings:
        """Return the recipe's decoding."""
        config = self.recipe.evaluate
        return GenerationSettings(
            num_beams=config.num_beams, min_tokens=config.min_tokens, max_tokens=config.max_tokens
        )

    def ask(
        self, image: ImageLike, question: str, *, settings: GenerationSettings | None = None
    ) -> Answer:
        """Answer one question about one image.

        Args:
            image: A path, encoded bytes, or a PIL image.
            question: In words.
            settings: Decoding; the recipe's when absent.

        Raises:
            CloverError: an image that cannot be read, or an empty question.
        """
        question = check_question(question)
        start = time.perf_counter()
        texts = self.answer_features(
            self.encode(image), [question], settings or self.default_settings()
        )
        return Answer(texts[0].strip(), self.name, round(time.perf_counter() - start, 3))

    @torch.no_grad()
    def stream(
        self,
        features: Tensor,
        turns: Sequence[tuple[str, str]],
        question: str,
        *,
        settings: GenerationSettings | None = None,
    ) -> Iterator[str]:
        """Yield the answer piece by piece, with earlier turns of the conversation in view.

        Args:
            features: The image's tokens [1, P, E] from `encode`.
            turns: (question, answer) pairs so far, oldest first.
            question: The new question; the Q-Former reads this one alone.
            settings: Decoding; the recipe's when absent.
        """
        self.bridge.eval()
        with self.device.autocast():
            prefix = self.visual_prefix(features, [question])
            after = self.prompt.conversation(turns, question)[1]
            yield from self.language.stream_text(prefix, after, settings or self.default_settings())

    def save(self, path: str | Path) -> Path:
        """Write the model folder: `config.json`, `bridge.safetensors`, `README.md`."""
        return save_folder(self, Path(path))


def check_question(question: str) -> str:
    """Return the question without blanks around it.

    Raises:
        CloverError: nothing is left.
    """
    if not question.strip():
        raise CloverError("the question is empty; ask for instance 'Is there necrosis?'")
    return question.strip()


def open_image(image: ImageLike) -> Image.Image:
    """Open an image given as path, bytes or PIL image.

    Raises:
        CloverError: no such file, or not an image.
    """
    if isinstance(image, Image.Image):
        return image
    name = "the image" if isinstance(image, bytes) else str(image)
    try:
        opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        opened.load()
    except FileNotFoundError as error:
        raise CloverError(f"no image {name}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CloverError(f"{name} cannot be read as an image: {error}") from error
    return opened


def save_folder(model: Clover, path: Path) -> Path:
    """Write a model folder; each file is whole or absent, the configuration comes last."""
    path.mkdir(parents=True, exist_ok=True)
    bridge = path / "bridge.safetensors"
    save_bridge(model.bridge, bridge)
    config = {
        "format": _FORMAT,
        "clover": __version__,
        "name": model.name,
        "recipe": model.recipe.model_dump(mode="json"),
        "encoder": {
            "id": model.encoder.id,
            "revision": model.encoder.revision,
            "width": model.encoder.width,
            "licence": model.encoder.licence,
        },
        "language": {
            "id": model.language.id,
            "width": model.language.hidden_size,
            "licence": model.language.licence,
        },
        "trainable_parameters": sum(item.numel() for item in model.bridge.parameters()),
        "bridge_sha256": sha256_file(bridge),
        "notice": NOTICE,
        **model.details,
    }
    write_text(path / "README.md", _card(config))
    write_json(path / "config.json", config)
    return path


def _card(config: dict[str, Any]) -> str:
    encoder, language = config["encoder"], config["language"]
    return f"""# {config["name"]}: a CLOVER model

**{NOTICE}**

| part | what | licence |
|---|---|---|
| image encoder, frozen, not in this folder | {encoder["id"]} | {encoder["licence"]} |
| language model, frozen, not in this folder | {language["id"]} | {language["licence"]} |
| bridge: trained parameters | {config["trainable_parameters"]:,} | its data's |

    clover ask FOLDER image.png "Is there necrosis?"
    clover chat FOLDER image.png

`config.json` holds the recipe, the prompt, and the hashes of everything frozen.
"""


def read_config(path: Path) -> dict[str, Any]:
    """Read a model folder's `config.json`.

    Raises:
        CloverError: not a model folder, or one of another version.
    """
    if not (path / "config.json").exists():
        raise CloverError(f"{path} is not a model folder: it holds no config.json")
    config = read_json(path / "config.json")
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise CloverError(
            f"{path} is a model folder of format {found}, this CLOVER reads {_FORMAT}; "
            "use the CLOVER version named in its config.json"
        )
    lacking = [name for name in ("name", "recipe", "encoder", "language") if name not in config]
    if lacking:
        raise CloverError(f"{path}/config.json lacks '{lacking[0]}': it is not whole")
    return config


def load(path: str | Path, *, device: str = "auto", precision: str = "auto") -> Clover:
    """Load a model folder.

    Args:
        path: Written by `clover tune` or `Clover.save`.
        device: `auto`, `cpu`, `cuda`, ...
        precision: `auto`, `float32` or `bfloat16`.

    Raises:
        CloverError: a file is missing, damaged, or does not belong to the named frozen parts.
    """
    path = Path(path)
    config = read_config(path)
    try:
        recipe = Recipe.model_validate(config["recipe"])
    except ValidationError as error:
        raise CloverError(explain_error(error, f"{path}/config.json, its recipe")) from error
    where = choose_device(device, precision)  # type: ignore[arg-type]
    encoder = load_encoder(recipe.encoder)
    if encoder.revision != config["encoder"]["revision"]:
        raise CloverError(
            f"{path} was trained on encoder revision {config['encoder']['revision']}, here it is "
            f"{encoder.revision}: other weights or another token map"
        )
    tokenizer = load_tokenizer(recipe)
    language = load_frozen_language(recipe.language, recipe.prompt, where)
    bridge = build_bridge(
        recipe.model_copy(update={"qformer": recipe.qformer.model_copy(update={"weights": None})}),
        encoder,
        tokenizer,
        language_width=language.hidden_size,
    )
    load_bridge(bridge, path / "bridge.safetensors", sha256=config.get("bridge_sha256"))
    bridge.to(where.device).eval().requires_grad_(False)
    kept: dict[str, Any] = {
        name: config[name] for name in ("key", "data", "stage_1") if name in config
    }
    return Clover(
        recipe, encoder, bridge, language, tokenizer, where, name=config["name"], details=kept
    )


def save_bridge(bridge: Bridge, path: Path) -> None:
    """Write what was trained as one safetensors file, atomically."""
    state = {name: item.detach().cpu().contiguous() for name, item in bridge.state_dict().items()}
    with atomic_path(path) as partial:
        save_file(state, str(partial), metadata={"format": "pt"})


def load_bridge(
    bridge: Bridge, path: Path, *, sha256: str | None = None, without: tuple[str, ...] = ()
) -> None:
    """Load trained weights into a bridge; the declared set must agree.

    Args:
        bridge: To be filled.
        path: A safetensors file.
        sha256: Expected hash.
        without: Prefixes of tensors that this bridge need not have, or the file need not hold
            (stage 2 drops stage 1's heads and brings its own projection).

    Raises:
        CloverError: the file is absent or damaged, or tensors are missing, extra or mis-shaped.
    """
    if not path.exists():
        raise CloverError(f"no file {path}")
    if sha256 is not None and sha256_file(path) != sha256:
        raise CloverError(f"{path} is damaged: its SHA-256 is not the one in config.json")
    try:
        state = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise CloverError(f"{path} is not a whole safetensors file: {error}") from error
    own = bridge.state_dict()
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            raise CloverError(
                f"{path}: {name} is {list(state[name].shape)}, the recipe wants "
                f"{list(own[name].shape)}; the Q-Former's sizes must be those it was trained with"
            )
    missing = [name for name in own if name not in state and not name.startswith(without)]
    extra = [name for name in state if name not in own and not name.startswith(without)]
    if missing or extra:
        raise CloverError(
            f"{path} does not fit: missing {missing[:3]}, not expected {extra[:3]} "
            f"({len(missing)} and {len(extra)} in all)"
        )
    bridge.load_state_dict(state, strict=False)
