"""Clover = image encoder + bridge (Q-Former) + language model + prompt.

`load(path)` gives a model one can ask; `build(recipe)` gives the parts that training puts together.
Only the bridge is ever written: frozen weights are named by reference and hash, never copied.

Research use only, not for diagnosis.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clover.aligned import Aligned, check_texts
from clover.core.assets import resolve, stamp
from clover.core.config import LanguageConfig, PromptConfig, QFormerConfig, Recipe
from clover.core.errors import CloverError
from clover.core.files import atomic_path, sha256_file
from clover.core.record import Record
from clover.core.tensors import open_tensors
from clover.core.transparency import on_white
from clover.language.load import LOADING, Weights, drive, load_weights
from clover.language.prompt import Prompt
from clover.language.protocol import GenerationSettings, LanguageModel
from clover.language.spread import spread_layers
from clover.language.words import Words
from clover.model_folder import NOTICE as NOTICE
from clover.model_folder import read_config as read_config
from clover.model_folder import recipe_of as recipe_of
from clover.model_folder import write_config as write_config
from clover.qformer.bridge import Bridge
from clover.qformer.caption import CaptionSettings
from clover.qformer.initialise import start_from_bert
from clover.qformer.tokenizer import WIDTHS, TextTokenizer, Tokens
from clover.slides.picture import check_is_no_slide, is_region, open_picture
from clover.training import processes
from clover.training.device import Device, choose_device
from clover.vision.encoder import ImageEncoder, load_encoder
from clover.vision.familiar import UNFAMILIAR, Familiarity
from clover.vision.turned import TurnedEncoder, plain_encoder

ImageLike: TypeAlias = "str | Path | bytes | Image.Image | NDArray[np.uint8]"
"""A path, `slide.svs#x,y,width_um,height_um`, encoded bytes, a PIL image, or RGB [H, W, 3]."""
_FAMILIAR = "familiarity.safetensors"
_DETAILS = (
    "key",
    "number_format",
    "data",
    "stage_1",
    "converted_from",
    "weights",
    "words",
    "spellings",
)
"""Entries of `config.json` that a model keeps when it is saved again."""


def load_frozen_language(
    config: LanguageConfig, prompt: PromptConfig, device: Device
) -> LanguageModel:
    """Load a frozen language model; its weights once a process.

    Stages that follow each other share them, and so do models that are served beside each other,
    whichever threads load them.
    """
    parsed = Prompt.from_config(prompt)
    is_spread = config.spread and processes.num_processes() > 1
    if config.weights:
        resolve(config.weights)  # before the stamp: what is fetched now would change it
    with LOADING:  # `lru_cache` alone would let every thread load
        now = stamp(config.weights) if config.weights else ""
        weights = _language_weights(
            config.kind, config.weights, config.quantise, device, now, is_spread
        )
        return drive(weights, config, parsed)


@lru_cache(maxsize=2)
def _language_weights(
    kind: str, weights: str, quantise: str, device: Device, now: str, is_spread: bool
) -> Weights:
    """Load once a process; `now` is another one when other files lie at the same place."""
    config = LanguageConfig.model_validate({"kind": kind, "weights": weights, "quantise": quantise})
    if not is_spread:
        return load_weights(config, device=device.device, dtype=device.dtype)
    if quantise != "none":
        raise CloverError(
            f"language.spread does not go with language.quantise={quantise}, whose weights cannot "
            "be taken apart; set one of them back"
        )
    with processes.in_turn():
        loaded = load_weights(config, device="cpu", dtype=device.dtype)
        spread_layers(loaded.model, device.device)
    return loaded


@dataclass(frozen=True)
class Answer:
    """What `Clover.ask` returns."""

    text: str
    model: str
    seconds: float
    notice: str = NOTICE
    note: str | None = None
    """Said where the image is unlike those the model learnt from."""

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
    """Build a bridge of the recipe's size, started from its BERT checkpoint where one is named.

    torch's generators are seeded with the recipe's seed: what a stage draws next follows from it.
    """
    torch.manual_seed(recipe.seed)
    bridge = Bridge(
        _bridge_config(recipe, encoder, tokenizer),
        language_width=language_width,
        has_alignment=has_alignment,
        temperature=recipe.align.temperature,
    )
    if recipe.qformer.weights is not None:
        path = resolve(recipe.qformer.weights)
        if "qformer.query_tokens" in open_tensors(path):
            # A Q-Former that has learnt already, as `clover convert` writes it.
            without = ("projection.",) if has_alignment else ("projection.", "heads.")
            load_bridge(bridge, path, without=without)
        else:
            start_from_bert(bridge, path)
    return bridge


def _bridge_config(
    recipe: Recipe, encoder: ImageEncoder, tokenizer: TextTokenizer
) -> QFormerConfig:
    """Return the Q-Former's sizes between this encoder and this tokenizer."""
    return recipe.qformer.model_copy(
        update={"encoder_width": encoder.width, "vocab_size": tokenizer.vocab_size}
    )


_COMPILED_WIDTHS = 32
"""Questions are padded to a multiple of so many tokens where each width is compiled for minutes."""


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
        aligned: Stage 1's own weights, for what they alone can do; see `attach_alignment`.
        familiarity: Of what images it learnt; None where nobody wrote it down.
        words: What its visual tokens are pulled to; None where they are left as they are.
    """

    recipe: Recipe
    encoder: ImageEncoder
    bridge: Bridge
    language: LanguageModel
    tokenizer: TextTokenizer
    device: Device
    name: str = "clover"
    details: dict[str, Any] = field(default_factory=dict)
    aligned: Aligned | None = None
    familiarity: Familiarity | None = None
    words: Words | None = None

    @cached_property
    def prompt(self) -> Prompt:
        """How image and question are put, in training and here alike."""
        return Prompt.from_config(self.recipe.prompt)

    def question_of(self, record: Record) -> str:
        """Return a record's question as it is put: a closed one carries the prompt's suffix."""
        is_closed = record.answer_type == "closed"
        return self.prompt.question(record.question or "", is_closed=is_closed)

    def question_tokens(self, questions: Sequence[str]) -> Tokens | None:
        """Return what the Q-Former reads of the questions; None when it does not read them.

        While it learns on a GPU they are padded to one of few widths, each of which is recorded
        for itself (`training.replay`), or compiled.
        """
        if not self.recipe.tune.instruction_aware:
            return None
        limit = min(self.recipe.tune.max_question_tokens, self.bridge.config.max_positions)
        multiple = WIDTHS if self.bridge.training and self.device.device.type == "cuda" else 1
        if self.bridge.training and self.recipe.tune.compile:
            multiple = _COMPILED_WIDTHS
        tokens = self.tokenizer(questions, limit=limit, side="left", multiple=multiple)
        return Tokens(self.device.put(tokens.ids), self.device.put(tokens.mask))

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
        visual = self.bridge.project(self.visual_hidden(features, questions))
        if self.words is None or not self.word_pull or self.bridge.training:
            return visual
        return self.words.pulled(visual, self.word_pull)

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
        return self._encoded(image, self.encoder)

    def _encode_once(self, image: ImageLike) -> Tensor:
        """Return an image's tokens as stage 1 learnt them: of the image as it is, without turns."""
        return self._encoded(image, plain_encoder(self.encoder))

    def _encoded(self, image: ImageLike, encoder: ImageEncoder) -> Tensor:
        picture = open_image(image, self.resolution_for(image))
        return encoder.encode(encoder.prepare(picture)[None]).float()

    def upright(self, features: Tensor) -> Tensor:
        """Return of an image's tokens [1, P, E] those of the image as it is, without its turns."""
        return features[:, : plain_encoder(self.encoder).num_tokens]

    def resolution_for(self, image: ImageLike) -> float | None:
        """Return the µm per pixel at which a region of a slide is read; None for a plain image.

        Raises:
            CloverError: a region, and nobody stated what the encoder learnt at.
        """
        if not isinstance(image, str | os.PathLike) or not is_region(image):
            return None
        return self.microns_per_pixel

    @property
    def word_pull(self) -> float:
        """How far a visual token is moved to its word (`evaluate.word_pull`)."""
        return 0.0 if self.words is None else self.recipe.evaluate.word_pull

    @property
    def microns_per_pixel(self) -> float:
        """The µm per pixel the encoder learnt at.

        Raises:
            CloverError: the model folder does not state it; it is never guessed.
        """
        if self.encoder.microns_per_pixel is None:
            raise CloverError(
                f"{self.name} does not state the µm per pixel its images were taken at, so a slide "
                "cannot be shown to it; set encoder.microns_per_pixel in its config.json or recipe"
            )
        return self.encoder.microns_per_pixel

    @property
    def field_um(self) -> float:
        """Side in µm of the square that fills the encoder's input at its own resolution."""
        return self.recipe.encoder.image_size * self.microns_per_pixel

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
            image: A path, `slide.svs#x,y,width_um,height_um`, encoded bytes, a PIL image, or a
                uint8 array [H, W, 3], RGB.
            question: In words.
            settings: Decoding; the recipe's when absent.

        Raises:
            CloverError: an image that cannot be read, or an empty question.
        """
        question = check_question(question)
        start = time.perf_counter()
        features = self.encode(image)
        texts = self.answer_features(features, [question], settings or self.default_settings())
        seconds = round(time.perf_counter() - start, 3)
        return Answer(texts[0].strip(), self.name, seconds, note=self.note_on(features))

    def note_on(self, features: Tensor) -> str | None:
        """Return what is to be said of an image [1, P, E] that is unlike the training images."""
        if self.familiarity is None:
            return None
        # It was described by images read once.
        nearer = self.familiarity.share_nearer(self.upright(features))
        if nearer < UNFAMILIAR:
            return None
        whom = "any" if nearer == 1 else f"{100 * nearer:.1f} %"
        return (
            "Note: this image is unlike those the model learnt from (farther from them than "
            f"{whom} of their own); the answer may mean nothing."
        )

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

        Raises:
            CloverError: something else than an image's tokens, or an empty question.
        """
        check_features(features, self.encoder.width)
        pieces = self._pieces(
            features, turns, check_question(question), settings or self.default_settings()
        )
        return _each_in(self.device.autocast, pieces)

    @torch.no_grad()
    def _pieces(
        self,
        features: Tensor,
        turns: Sequence[tuple[str, str]],
        question: str,
        settings: GenerationSettings,
    ) -> Iterator[str]:
        self.bridge.eval()
        prefix = self.visual_prefix(features, [question])
        yield from self.language.stream_text(
            prefix, self.prompt.conversation(turns, question)[1], settings
        )

    def rank(
        self, image: ImageLike, question: str, candidates: Sequence[str]
    ) -> list[tuple[str, float]]:
        """Order candidate answers by their loss, the likeliest first (SPEC, section 4.3).

        Args:
            image: As `ask` takes it.
            question: In words.
            candidates: Possible answers.

        Returns:
            (answer, summed log-likelihood of its tokens, the end token included).

        Raises:
            CloverError: as `ask`, or one candidate alone that is not in a list.
        """
        question = check_question(question)
        candidates = check_texts(candidates, "candidates")
        self.bridge.eval()
        with torch.no_grad(), self.device.autocast():
            prefix = self.visual_prefix(self.encode(image), [question])
            scores = self.language.rank(prefix, question, candidates)
        return sorted(zip(candidates, scores, strict=True), key=lambda pair: -pair[1])

    def attach_alignment(self, path: str | Path) -> Aligned:
        """Load stage 1's weights (`align.safetensors`) beside the tuned ones.

        Raises:
            CloverError: absent, damaged, or of other sizes.
        """
        with _drawing_nothing():
            bridge = Bridge(self.bridge.config, has_alignment=True)
        load_bridge(bridge, Path(path))
        bridge.to(self.device.device).eval().requires_grad_(False)
        self.aligned = Aligned(bridge, self.tokenizer, self.recipe.align.max_text_tokens)
        return self.aligned

    def _stage_1(self) -> Aligned:
        if self.aligned is None:
            raise CloverError(
                f"{self.name} was loaded without stage 1's weights, which caption, match and "
                "compare; put align.safetensors into its folder, or call attach_alignment(FILE)"
            )
        return self.aligned

    def caption(self, image: ImageLike, settings: CaptionSettings | None = None) -> str:
        """Describe an image with stage 1's next-word head; `ask` does with the language model."""
        return self._stage_1().caption(self._encode_once(image), settings)

    def match(self, image: ImageLike, texts: Sequence[str]) -> list[float]:
        """Return the probability that each text belongs to the image.

        Raises:
            CloverError: as `ask`, or one text alone that is not in a list, or an empty one.
        """
        return self._stage_1().match(self._encode_once(image), texts)

    def similarity(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """Return cosines [B, N] of B images and N texts.

        Raises:
            CloverError: as `ask`, or one image or text alone that is not in a list.
        """
        is_one = isinstance(images, str | bytes | os.PathLike | Image.Image)
        found = [] if is_one or getattr(images, "ndim", 0) == 3 else list(images)
        if not found:
            raise CloverError("images is one image, or none; give a list: [image]")
        features = torch.cat([self._encode_once(image) for image in found])
        return self._stage_1().similarity(features, texts)

    def features(self, image: ImageLike) -> Tensor:
        """Return an image's contrastive unit vectors [Q, C]; `encode` gives its tokens."""
        return self._stage_1().image_vectors(self._encode_once(image))[0]

    def save(self, path: str | Path) -> Path:
        """Write the model folder: `config.json`, `bridge.safetensors`, `README.md`."""
        return save_folder(self, Path(path))


def _each_in(
    context: Callable[[], contextlib.AbstractContextManager[object]], pieces: Iterator[str]
) -> Iterator[str]:
    """Yield what is made piece by piece inside a context, which the caller's own code is never in.

    A `with` around a `yield` would stay open wherever the caller goes meanwhile, and two that are
    left in another order than they were entered put back each other's state.
    """
    while True:
        with context():
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def check_features(features: object, width: int) -> None:
    """Refuse what is not one image's tokens [1, P, width].

    Raises:
        CloverError: it is something else.
    """
    if not isinstance(features, Tensor):
        raise CloverError(
            f"features is a {type(features).__name__}; give an image's tokens: model.encode(image)"
        )
    if features.ndim != 3 or len(features) != 1 or features.shape[2] != width:
        raise CloverError(
            f"features is {list(features.shape)}, one image's tokens are [1, P, {width}]; give "
            "model.encode(image)"
        )


def check_question(question: object) -> str:
    """Return the question without blanks around it.

    Raises:
        CloverError: nothing is left, or it is no text.
    """
    if not isinstance(question, str):
        raise CloverError(
            f"the question is a {type(question).__name__}; give text, for instance "
            "'Is there necrosis?'"
        )
    if not question.strip():
        raise CloverError("the question is empty; ask for instance 'Is there necrosis?'")
    return question.strip()


def open_image(image: ImageLike, microns_per_pixel: float | None = None) -> Image.Image:
    """Open an image given in any of the forms of `ImageLike`; transparency is white.

    Args:
        image: What to open.
        microns_per_pixel: Of a region's picture; None only looks a region over.

    Raises:
        CloverError: no such file, not an image, a whole slide, or a region that cannot be read.
    """
    _check_may_be_image(image)
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return on_white(image)
    if not isinstance(image, bytes) and not is_region(image):
        check_is_no_slide(image)
    return open_picture(image, microns_per_pixel)


def _check_may_be_image(image: object) -> None:
    """Refuse what is of no kind that an image comes as.

    Raises:
        CloverError: it is something else, or an array that is not RGB.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise CloverError(
                f"the image is a {image.dtype} array {list(image.shape)}; give uint8 "
                "[height, width, 3], RGB from 0 to 255"
            )
    elif not isinstance(image, str | os.PathLike | bytes | Image.Image):
        raise CloverError(
            f"the image is a {type(image).__name__}; give a path, slide.svs#x,y,width,height (µm), "
            "encoded bytes, a PIL image, or a uint8 array [height, width, 3]"
        )


def save_folder(model: Clover, path: Path) -> Path:
    """Write a model folder; each file is whole or absent, the configuration comes last."""
    path.mkdir(parents=True, exist_ok=True)
    bridge = path / "bridge.safetensors"
    save_bridge(model.bridge, bridge)
    familiar = path / _FAMILIAR
    if model.familiarity is None:
        familiar.unlink(missing_ok=True)  # an earlier model's
    else:
        model.familiarity.save(familiar)
    write_config(
        path,
        name=model.name,
        recipe=model.recipe.model_dump(mode="json"),
        encoder={
            "id": model.encoder.id,
            "revision": plain_encoder(model.encoder).revision,
            "width": model.encoder.width,
            "licence": model.encoder.licence,
            **({"licence_note": note} if (note := model.encoder.licence_note) else {}),
        },
        language={
            "id": model.language.id,
            "width": model.language.hidden_size,
            "licence": model.language.licence,
        },
        trainable=model.bridge.num_trainable(),
        details=model.details,
    )
    return path


def model_files(path: Path) -> list[Path]:
    """Return what `save_folder` writes, the configuration first."""
    names = ("config.json", "bridge.safetensors", _FAMILIAR, "README.md")
    return [path / name for name in names]


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    beside: Clover | None = None,
) -> Clover:
    """Load a model folder.

    Threads may load at the same time: one after the other does, and they share the language model.
    Random numbers that are drawn afterwards are those that would have been drawn without it.

    Args:
        path: Written by `clover tune` or `Clover.save`.
        device: `auto`, `cpu`, `cuda`, ...
        precision: `float32`, `bfloat16`, or `auto`: what the recipe says, which may be `auto` too.
        beside: A loaded model; its image encoder serves this one too where it is the same, as
            language models do in any case: a further model costs its bridge alone.

    Raises:
        CloverError: a file is missing, damaged, or does not belong to the named frozen parts; or
            no such precision.
    """
    with LOADING, _drawing_nothing():
        return _load(Path(path), device, precision, beside)


def _drawing_nothing() -> contextlib.AbstractContextManager[None]:
    """Put torch's generator back: weights are drawn first and read then, always on the CPU."""
    return torch.random.fork_rng(devices=[])


def _load(path: Path, device: str, precision: str, beside: Clover | None) -> Clover:
    config = read_config(path)
    recipe = recipe_of(config, path)
    # A recipe that insists on a format is answered in it as well.
    numbers = recipe.precision if precision == "auto" else precision
    where = choose_device(device, numbers)  # type: ignore[arg-type]
    said = config["encoder"]["revision"]
    is_shared = beside is not None and beside.recipe.encoder == recipe.encoder
    if beside is not None and is_shared and _is_named(plain_encoder(beside.encoder), said):
        encoder = plain_encoder(beside.encoder)
    else:
        encoder = load_encoder(recipe.encoder)
    if not _is_named(encoder, said):
        raise CloverError(
            f"{path} was trained on encoder revision {said}, here it is "
            f"{encoder.revision}: other weights or another token map"
        )
    if recipe.evaluate.turns > 1:
        encoder = TurnedEncoder(encoder, recipe.evaluate.turns)
    tokenizer = load_tokenizer(recipe)
    language = load_frozen_language(recipe.language, recipe.prompt, where)
    sizes = _bridge_config(recipe, encoder, tokenizer)
    bridge = Bridge(sizes, language_width=language.hidden_size)
    load_bridge(bridge, path / "bridge.safetensors", sha256=config.get("bridge_sha256"))
    bridge.to(where.device).eval().requires_grad_(False)
    kept: dict[str, Any] = {name: config[name] for name in _DETAILS if name in config}
    model = Clover(
        recipe, encoder, bridge, language, tokenizer, where, name=config["name"], details=kept
    )
    if (path / "align.safetensors").exists():
        model.attach_alignment(path / "align.safetensors")
    if (path / _FAMILIAR).exists():
        model.familiarity = Familiarity.load(path / _FAMILIAR)
    if recipe.evaluate.word_pull and "words" in kept:
        model.words = Words.of(language, kept["words"], where.device, kept.get("spellings"))
    return model


def _is_named(encoder: ImageEncoder, revision: str) -> bool:
    """Return whether a folder that states this revision means this encoder."""
    return revision in (encoder.revision, encoder.named_revision)


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
            if name.startswith("projection."):
                raise CloverError(
                    f"{path} was trained for a language model {len(state[name])} wide, this one is "
                    f"{len(own[name])}; name the one it was trained with in language.weights"
                )
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
