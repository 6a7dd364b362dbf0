"""From counted steps to memory, hours, dollars, and the switch that makes a recipe fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clover.core.config import Recipe
from clover.plan.pace import PACES
from clover.plan.step import (
    EncoderSize,
    StepSize,
    align_size,
    encoder_size,
    products_of,
    tune_size,
)
from clover.vision.storage import bytes_a_token

_GIB = 2**30


@dataclass(frozen=True)
class Card:
    """What the recipe is to run on.

    Attributes:
        memory_gib: Its memory.
        tflops: Operations a second that a large matrix product makes on it, in 10^12.
        price: Dollars an hour.
    """

    memory_gib: float
    tflops: float
    price: float

    def seconds(self, stage: str, operations: float, numbers: str = "bfloat16") -> float:
        """Return how long a step, or an image, of so many operations takes in a stage."""
        return PACES[stage].seconds(operations, self.tflops, numbers)


@dataclass(frozen=True)
class Plan:
    """All that `clover plan` prints."""

    recipe: Recipe
    card: Card
    images: int
    encoder: EncoderSize
    align: StepSize
    tune: StepSize
    switch: str | None
    """Settings that make it fit; None when it fits, or when none of them does."""

    @property
    def fits(self) -> bool:
        """Whether each stage's peak fits the card."""
        return max(self.peaks().values()) <= self.card.memory_gib

    def peaks(self) -> dict[str, float]:
        """Return each stage's peak in GiB."""
        features = self.encoder.weights + self.encoder.image.peak
        sizes = {"features": features, "align": self.align.peak, "tune": self.tune.peak}
        return {name: size / _GIB for name, size in sizes.items()}

    def hours(self) -> dict[str, float]:
        """Return each stage's hours."""
        recipe, seconds = self.recipe, self.seconds()
        one = self.card.seconds("tune", self.tune.operations_before, self._products())
        before = one * _steps_before(recipe)
        return {
            "features": seconds["features"] * self.views() / 3600,
            "align": seconds["align"] * recipe.align.steps / 3600,
            "tune": (seconds["tune"] * recipe.tune.steps + before) / 3600,
        }

    def seconds(self) -> dict[str, float]:
        """Return the seconds of an image, and of a step of either stage."""
        card, products = self.card, self._products()
        image = self.encoder.image.operations
        return {
            "features": card.seconds("features", image, self.encoder.numbers),
            "align": card.seconds("align", self.align.operations, products),
            "tune": card.seconds("tune", self.tune.operations, products),
        }

    def _products(self) -> str:
        """Return the format of both stages' products on a card."""
        return str(products_of(self.recipe)).removeprefix("torch.")

    def views(self) -> int:
        """Return how many views of all images are encoded and kept."""
        return self.images * self.recipe.encoder.views

    def cache_gib(self) -> float:
        """Return the disk that the features of all views take."""
        token = bytes_a_token(self.encoder.width, self.recipe.encoder.storage)
        return self.views() * self.encoder.num_tokens * token / _GIB

    def row(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        parts: dict[str, Any] = {
            "features": {
                "trainable_parameters": 0,
                "frozen_parameters": self.encoder.parameters,
                "gib": {
                    "trained weights": 0.0,
                    "frozen weights": round(self.encoder.weights / _GIB, 2),
                    "gradients and moments": 0.0,
                    "activations": round(self.encoder.image.peak / _GIB, 2),
                },
                "tflop_a_step": round(self.encoder.image.operations / 1e12, 3),
                "steps": self.views(),
                "batch_size": 1,
            }
        }
        for name, size in (("align", self.align), ("tune", self.tune)):
            config = getattr(self.recipe, name)
            parts[name] = {
                "trainable_parameters": size.trainable,
                "frozen_parameters": size.frozen,
                "gib": {
                    "trained weights": round(size.weights / _GIB, 2),
                    "frozen weights": round(size.frozen_weights / _GIB, 2),
                    "gradients and moments": round(size.optimiser / _GIB, 2),
                    "activations": round(size.activations / _GIB, 2),
                },
                "tflop_a_step": round(size.operations / 1e12, 3),
                "steps": config.steps,
                "batch_size": config.batch_size,
            }
        parts["tune"] |= {
            "steps_before": _steps_before(self.recipe),
            "tflop_a_step_before": round(self.tune.operations_before / 1e12, 3),
        }
        hours = self.hours()
        return {
            "recipe": self.recipe.name,
            "encoder": self.encoder.id,
            "encoder_parameters": self.encoder.parameters,
            "encoder_numbers": self.encoder.numbers,
            "language": self.recipe.language.weights.split("?")[0],
            "language_numbers": self.tune.frozen_numbers,
            "trained_numbers": self.tune.trained_numbers,
            "images": self.images,
            "views": self.recipe.encoder.views,
            "cache_gib": round(self.cache_gib(), 2),
            "peak_gib": {name: round(value, 2) for name, value in self.peaks().items()},
            "seconds_a_step": {name: round(value, 5) for name, value in self.seconds().items()},
            "hours": {name: round(value, 2) for name, value in hours.items()},
            "dollars": {n: round(v * self.card.price, 2) for n, v in hours.items()},
            "fits": self.fits,
            "switch": self.switch,
            **parts,
        }


def _steps_before(recipe: Recipe) -> int:
    """Return how many steps of stage 2 do without the language model."""
    tune = recipe.tune
    return tune.grounding_steps + tune.anchoring_steps if tune.grounding_steps else 0


def plan(recipe: Recipe, card: Card, *, images: int) -> Plan:
    """Count a recipe's stages, and where one does not fit look for the switch that mends it.

    Args:
        recipe: Any.
        card: What it is to run on.
        images: How many images are encoded.

    Raises:
        CloverError: the encoder or the language model is not known.
    """
    encoder = encoder_size(recipe.encoder, batch=recipe.encoder.batch_size)
    found = Plan(
        recipe, card, images, encoder, align_size(recipe, encoder), tune_size(recipe, encoder), None
    )
    if found.fits:
        return found
    changed = _mend(recipe, encoder, card)
    return Plan(recipe, card, images, encoder, found.align, found.tune, changed)


def _mend(recipe: Recipe, encoder: EncoderSize, card: Card) -> str | None:
    """Return the settings that make every stage fit, the cheapest first; None when none do."""
    limit = card.memory_gib * _GIB
    settings: list[str] = []
    batch = recipe.encoder.batch_size
    while encoder.weights + encoder.image.peak > limit and batch > 1:
        batch //= 2
        encoder = encoder_size(recipe.encoder, batch=batch)
    if encoder.weights + encoder.image.peak > limit:
        return None
    if batch != recipe.encoder.batch_size:
        settings.append(f"encoder.batch_size={batch}")
    for stage, measure in (("align", align_size), ("tune", tune_size)):
        # int8 runs everywhere; four bits need bitsandbytes.
        for quantise in ("none", "int8", "bnb-4bit") if stage == "tune" else ("none",):
            chosen = _split(recipe, encoder, stage, measure, limit, quantise=quantise)
            if chosen is not None:
                settings += chosen
                break
        else:
            return None
    return " ".join(f"--set {item}" for item in settings) or None


def _split(
    recipe: Recipe, encoder: EncoderSize, stage: str, measure: Any, limit: float, *, quantise: str
) -> list[str] | None:
    """Return the fewest parts that a stage's batch must be split into to fit, as settings."""
    language = recipe.language
    more = []
    if quantise != "none":
        language = language.model_copy(update={"quantise": quantise})
        more = [f"language.quantise={quantise}"]
    config = getattr(recipe, stage)
    if stage == "align" and config.accumulate > 1:  # which a single process refuses
        config = config.model_copy(update={"accumulate": 1})
        more = [*more, "align.accumulate=1"]
    for parts in range(config.accumulate, config.batch_size + 1):
        if config.batch_size % parts:
            continue
        changes = {} if parts == config.accumulate else {"accumulate": parts}
        if stage == "align" and changes:
            # Sums of parts are not the losses of a batch whose pairs are compared with each other.
            changes = {"gradient_chunk": config.batch_size // parts}
        changed = recipe.model_copy(
            update={"language": language, stage: config.model_copy(update=changes)}
        )
        if measure(changed, encoder).peak <= limit:
            return more + [f"{stage}.{name}={value}" for name, value in changes.items()]
    return None
