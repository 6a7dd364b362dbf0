"""Run stage 1: from captioned images to a Q-Former that knows what the words look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from clover.align.evaluate import RetrievalScores, evaluate_alignment
from clover.align.objective import AlignObjective
from clover.core.config import Recipe
from clover.core.errors import CloverError
from clover.core.files import read_json, write_json
from clover.core.record_file import sha256_records
from clover.core.run import RunFolder
from clover.model import build_bridge, load_bridge, load_tokenizer, save_bridge
from clover.qformer.calibrate import calibrate_alignment, calibrate_image
from clover.training import processes
from clover.training.checkpoint import clear_checkpoints
from clover.training.device import choose_device
from clover.training.earlier import Earlier
from clover.training.loop import TrainingJob, train
from clover.training.made_from import MadeFrom
from clover.training.validation import BestWeights, Kept, Validation, say_kept, settle
from clover.vision.dataset import FeatureSet, load_feature_set
from clover.vision.encoder import load_encoder
from clover.vision.leaks import load_training_set

_SCORES = "align.scores.json"


@dataclass(frozen=True)
class AlignResult:
    """What stage 1 leaves: the weights' file, and retrieval on held-out pairs if given."""

    weights: Path
    summary: str
    scores: RetrievalScores | None
    is_finished: bool
    kept: str | None = None
    """Which weights the file holds, where training was validated."""


@processes.together
@processes.alone_in("out")
def align(
    recipe: Recipe,
    *,
    captions: Path,
    out: Path,
    cache: Path,
    validation: Path | None = None,
    held_out: Sequence[Path] = (),
    max_steps: int | None = None,
) -> AlignResult:
    """Train stage 1, or what is left of it, and write `OUT/align.safetensors`.

    Args:
        recipe: Sizes and settings.
        captions: Records with captions.
        out: The run folder.
        cache: The feature cache's folder.
        validation: Held-out captions for image-text retrieval, at the end and, with
            `align.validate_every`, while training goes on.
        held_out: Record files that are only ever evaluated: refused where they share an image or
            a group with the training data.
        max_steps: Stop after so many steps; the same call without it goes on.

    Raises:
        CloverError: unusable data or settings, or another process trains in `out`.
    """
    is_first = processes.is_first()
    run = RunFolder(out, is_writer=is_first)
    run.save_recipe(recipe, replaces=False)
    device = choose_device(recipe.device, recipe.precision)
    encoder = load_encoder(recipe.encoder)
    tokenizer = load_tokenizer(recipe)
    with run.timed("features"):
        data = load_training_set(
            captions,
            needs="caption",
            recipe=recipe,
            encoder=encoder,
            cache=cache,
            held_out=held_out,
            rejected=out / "align.rejected.jsonl" if is_first else None,
        )
    _check_pairs(recipe, len(data.records))
    bridge = build_bridge(recipe, encoder, tokenizer, has_alignment=True)
    made_from = MadeFrom.of(
        recipe,
        *("seed", "encoder", "qformer", "align"),
        device=device,
        files={"the captions' sha256": sha256_records(captions)},
        images=data.named(),
    )
    processes.check_same("captions, images or number formats", made_from.resume_key)
    weights = out / "align.safetensors"
    done = out / "align.json"
    is_finished = weights.exists() and made_from.is_that_of(done)
    processes.check_same("results in --out", is_finished)
    is_trained_here = not is_finished
    products = (weights, *(_beside(weights, which) for which in get_args(Kept)), out / _SCORES)
    earlier = (
        None if is_finished or not is_first else Earlier.of(done, *products, folder=out / "earlier")
    )
    kept = None

    @lru_cache(maxsize=1)  # once, whether it is read while training goes on, after, or both
    def unseen(path: Path) -> FeatureSet:
        return load_feature_set(
            path, needs="caption", encoder=encoder, cache=cache, images=recipe.data.images
        )

    config = recipe.within_positions().align
    if is_trained_here:
        objective = AlignObjective(bridge, data, tokenizer, config, device)
        measured = Validation.of(
            "align",
            recipe.align,
            validation,
            lambda path: _recall(objective, unseen(path)),
            lacking="captions; give --validation FILE",
            figure="mean_recall",
            is_larger_better=True,
            training=made_from.resume_key,
        )
        seed = recipe.seed if recipe.align.seed is None else recipe.align.seed
        job = TrainingJob(
            "align",
            recipe.align,
            run,
            device,
            seed,
            made_from.resume_key,
            max_steps,
            made_from.resume_settings(),
            recipe,
        )
        with run.timed("align") as details:
            calibrate(objective, num_samples=recipe.qformer.calibrate)
            is_finished = train(objective, job, measured)
            details["trainable_parameters"] = bridge.num_trainable()
        if not is_finished:
            return AlignResult(weights, data.summary(), None, False)
    if is_trained_here and is_first:
        if earlier is not None:
            earlier.keep()
        finished: dict[str, Any] = {**made_from.note(), "summary": data.summary()}
        if measured is not None:
            finished["weights"] = settle(
                bridge,
                BestWeights(run.checkpoints / "align", measured),
                steps=recipe.align.steps,
                keep=recipe.align.keep_weights,
                save_other=lambda which, _: save_bridge(bridge, _beside(weights, which)),
            )
        save_bridge(bridge, weights)
        write_json(done, finished)
    processes.wait_for_all()
    if not is_first:  # what is left is scores, and the first one's
        return AlignResult(weights, data.summary(), None, True)
    clear_checkpoints(run.checkpoints / "align")
    if note := read_json(done).get("weights"):
        which: Kept = "last" if note["kept"] == "best" else "best"
        kept = say_kept(note, weights, _beside(weights, which))
    scores = None
    if validation is not None:
        load_bridge(bridge, weights)  # also when an earlier call trained it
        bridge.to(device.device).eval()
        scores = evaluate_alignment(bridge, unseen(validation), tokenizer, config, device)
        write_json(out / _SCORES, scores.row())
    return AlignResult(weights, data.summary(), scores, True, kept)


def _check_pairs(recipe: Recipe, count: int) -> None:
    """Refuse settings that leave a pair nothing to be told from.

    Raises:
        CloverError: fewer than two pairs, or two a batch.
    """
    config = recipe.align
    if count < 2 or config.batch_size < 2:
        raise CloverError(
            f"stage 1 needs at least 2 pairs a batch: found {count} pairs and "
            f"align.batch_size {config.batch_size}"
        )
    if config.accumulate > 1 and processes.num_processes() == 1:
        # Contrast and negatives see one part alone: not the losses of the batch.
        chunk = config.batch_size // config.accumulate
        raise CloverError(
            f"align.accumulate is {config.accumulate}, but a pair is compared with its whole "
            f"batch; align.gradient_chunk={chunk} has the gradients of align.batch_size="
            f"{config.batch_size} in the memory of {chunk} pairs"
        )


def _beside(weights: Path, which: Kept) -> Path:
    """Return where the weights lie that the product does not hold: `align.best.safetensors`."""
    return weights.with_suffix(f".{which}.safetensors")


def _recall(objective: AlignObjective, unseen: FeatureSet) -> Callable[[], dict[str, float]]:
    """Return what measures retrieval among held-out pairs while training goes on."""
    config = objective.config
    some = unseen.evenly(config.validate_samples)

    def scores() -> dict[str, float]:
        found = evaluate_alignment(
            objective.module, some, objective.tokenizer, config, objective.device
        ).row()
        recalls = [value for name, value in found.items() if "recall" in name]
        return {**found, "mean_recall": round(sum(recalls) / len(recalls), 3)}

    return scores


def calibrate(objective: AlignObjective, *, num_samples: int) -> None:
    """Start the bridge's fresh weights at the scale of the first `num_samples` pairs."""
    if num_samples < 2:
        return
    features, text = objective.collate(range(min(num_samples, objective.num_samples())))
    bridge = objective.module.to(features.device)
    calibrate_image(bridge, features)
    calibrate_alignment(bridge, features, text)
