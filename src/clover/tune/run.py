"""Run stage 2: from aligned queries and instructions to a model that answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clover.core.config import Recipe, TuneConfig
from clover.core.errors import CloverError
from clover.core.files import read_json, sha256_file
from clover.core.record import Record
from clover.core.record_file import columns, sha256_records
from clover.core.run import RunFolder
from clover.language.prompt import EXAMPLES
from clover.language.protocol import LanguageModel
from clover.language.words import Words
from clover.model import (
    Clover,
    build_bridge,
    load_bridge,
    load_frozen_language,
    load_tokenizer,
    model_files,
)
from clover.qformer.calibrate import calibrate_image, calibrate_projection
from clover.qformer.used_words import all_words, only_words
from clover.training import processes
from clover.training.checkpoint import clear_checkpoints
from clover.training.device import choose_device
from clover.training.earlier import Earlier
from clover.training.loop import TrainingJob, train
from clover.training.made_from import MadeFrom
from clover.training.validation import BestWeights, Kept, Validation, say_kept, settle
from clover.tune.example import choose_examples, write_examples
from clover.tune.grounding import GroundingObjective, refit_projection
from clover.tune.objective import KeptSpelling, TuneObjective
from clover.tune.spelling import Spelling
from clover.tune.validate import FIGURE, AnswerLoss
from clover.vision.dataset import load_feature_set
from clover.vision.encoder import load_encoder
from clover.vision.familiar import describe
from clover.vision.leaks import load_training_set

_DATA, _STAGE_1 = "the instructions' sha256", "stage 1's sha256"


@dataclass(frozen=True)
class TuneResult:
    """Where the model folder lies, and what it was made from."""

    model: Path
    summary: str
    is_finished: bool
    kept: str | None = None
    """Which weights the folder holds, where training was validated."""


@processes.together
@processes.alone_in("run", "out")
def tune(
    recipe: Recipe,
    *,
    instructions: Path,
    out: Path,
    run: Path,
    cache: Path,
    start: Path | None = None,
    validation: Path | None = None,
    held_out: Sequence[Path] = (),
    max_steps: int | None = None,
) -> TuneResult:
    """Train stage 2, or what is left of it, and write the model folder `OUT`.

    Args:
        recipe: Sizes and settings.
        instructions: Records with questions and answers.
        out: The model folder.
        run: The run folder, for metrics and checkpoints.
        cache: The feature cache's folder.
        start: Stage 1's `align.safetensors`; without it the Q-Former starts from BERT.
        validation: Held-out questions, for `tune.validate_every`.
        held_out: Record files that are only ever evaluated: refused where they share an image or
            a group with the training data.
        max_steps: Stop after so many steps; the same call without it goes on.

    Raises:
        CloverError: unusable data or settings, or another process trains in `run` or `out`.
    """
    is_first = processes.is_first()
    folder = RunFolder(run, is_writer=is_first)
    folder.save_recipe(recipe, replaces=False)
    device = choose_device(recipe.device, recipe.precision)
    encoder = load_encoder(recipe.encoder)
    tokenizer = load_tokenizer(recipe)
    with folder.timed("features"):
        data = load_training_set(
            instructions,
            needs="question",
            recipe=recipe,
            encoder=encoder,
            cache=cache,
            held_out=held_out,
            rejected=run / "tune.rejected.jsonl" if is_first else None,
        )
    files = {
        _DATA: sha256_records(instructions),
        _STAGE_1: None if start is None else sha256_file(start),
    }
    made_from = MadeFrom.of(
        recipe,
        *("seed", "encoder", "qformer", "language", "prompt", "tune"),
        device=device,
        files=files,
        images=data.named(),
    )
    is_finished = made_from.is_that_of(out / "config.json")
    processes.check_same(
        "data, images, number formats or results", [made_from.resume_key, is_finished]
    )
    if is_finished:
        _clear(folder)
        return TuneResult(out, data.summary(), True, _said(out, run))
    earlier = None
    if is_first:
        earlier = Earlier.of(*model_files(out), folder=out.with_name(f"{out.name}.earlier"))
    as_given, recipe = recipe, recipe.within_positions()
    language = load_frozen_language(recipe.language, recipe.prompt, device)
    if recipe.tune.worked_examples:
        recipe = with_examples(recipe, data.records, language)
        language = load_frozen_language(recipe.language, recipe.prompt, device)
    bridge = build_bridge(recipe, encoder, tokenizer, language_width=language.hidden_size)
    if start is not None:
        load_bridge(bridge, start, without=("heads.", "projection."))
    model = Clover(recipe, encoder, bridge, language, tokenizer, device, name=recipe.name)
    measured = Validation.of(
        "tune",
        recipe.tune,
        validation,
        lambda path: _answer_loss(model, path, cache),
        lacking="questions; give --validation FILE, name data.validation",
        figure=FIGURE,
        is_larger_better=False,
        training=made_from.resume_key,
    )
    seed = recipe.seed if recipe.tune.seed is None else recipe.tune.seed
    job = TrainingJob(
        "tune",
        recipe.tune,
        folder,
        device,
        seed,
        made_from.resume_key,
        max_steps,
        made_from.resume_settings(),
        as_given,
    )
    with folder.timed("tune") as details:
        objective = TuneObjective(model, data)
        calibrate(objective, num_samples=recipe.qformer.calibrate, is_aligned=start is not None)
        words = objective.words() if recipe.qformer.train_word_embedding else None
        with only_words(bridge.qformer, words):
            spelt = ground(objective, job) if recipe.tune.grounding_steps else None
            is_finished = train(objective, job, measured)
            model.details = {
                **made_from.note(),
                "data": {"instructions_sha256": files[_DATA], "summary": data.summary()},
                "stage_1": files[_STAGE_1],
                **(_spelling(spelt) if spelt is not None else {}),
            }
            if is_finished and is_first:
                model.familiarity = describe(data)
                if measured is not None:
                    model.details["weights"] = settle(
                        bridge,
                        BestWeights(folder.checkpoints / "tune", measured),
                        steps=recipe.tune.steps,
                        keep=recipe.tune.keep_weights,
                        save_other=partial(_save_other, model, run),
                    )
        details["trainable_parameters"] = bridge.num_trainable()
    if is_finished and is_first:
        if earlier is not None:
            earlier.keep()
        model.save(out)
        _clear(folder)
    processes.wait_for_all()
    return TuneResult(out, data.summary(), is_finished, _said(out, run) if is_finished else None)


def _spelling(words: Words) -> dict[str, Any]:
    """Return what a model folder states of the words its visual tokens are."""
    spellings = words.spellings
    return {
        "words": words.ids.tolist(),
        **({"spellings": spellings.tolist()} if spellings is not None else {}),
    }


def _beside(run: Path, which: Kept) -> Path:
    """Return where the model lies whose weights the product does not hold: `RUN/tune-best`."""
    return run / f"tune-{which}"


def _save_other(model: Clover, run: Path, which: Kept, note: dict[str, Any]) -> None:
    """Write the model as it is into a folder of its own, with all its words."""
    before = model.details
    model.details = {**before, "weights": note}
    with all_words(model.bridge.qformer):
        model.save(_beside(run, which))
    model.details = before


def _said(out: Path, run: Path) -> str | None:
    """Return which weights a finished model folder holds, where training was validated."""
    if not processes.is_first():
        return None
    note = read_json(out / "config.json").get("weights")
    if note is None:
        return None
    return say_kept(note, out, _beside(run, "last" if note["kept"] == "best" else "best"))


def _answer_loss(model: Clover, path: Path, cache: Path) -> AnswerLoss:
    """Return what measures the answer loss on held-out questions while training goes on."""
    config = model.recipe.tune
    unseen = load_feature_set(
        path,
        needs="question",
        encoder=model.encoder,
        cache=cache,
        images=model.recipe.data.images,
    ).evenly(config.validate_samples)
    share = config.batch_size // config.accumulate // processes.num_processes()
    return AnswerLoss(model, unseen, max(1, share))


def _clear(run: RunFolder) -> None:
    if not processes.is_first():
        return
    for stage in ("ground", "anchor", "tune"):
        clear_checkpoints(run.checkpoints / stage)


def with_examples(recipe: Recipe, records: Sequence[Record], language: LanguageModel) -> Recipe:
    """Return the recipe with worked examples in its prompt; they come from the training data.

    Raises:
        CloverError: the template has no place for them.
    """
    if EXAMPLES not in recipe.prompt.template:
        raise CloverError(
            f"tune.worked_examples is {recipe.tune.worked_examples}, but prompt.template has no "
            f"place for them; write {EXAMPLES} before its first turn, or set "
            "tune.worked_examples to 0"
        )
    spelling = Spelling.of(
        (answer or "" for (answer,) in columns(records, "answer")),
        encode=language.text_tokens,
        num_places=recipe.qformer.num_queries,
        filler=recipe.tune.grounding_filler,
        kind=recipe.tune.grounding_spelling,
    )
    examples = choose_examples(
        records, recipe.tune.worked_examples, fits=lambda answer: spelling.text(answer) is not None
    )
    return recipe.model_copy(
        update={"prompt": write_examples(recipe.prompt, examples, spelt=spelling.text)}
    )


def ground(objective: TuneObjective, job: TrainingJob) -> Words | None:
    """Run the steps before the language model's own, or what is left of them.

    Two stages with checkpoints of their own; the closed-form fit between them is made again.

    Returns:
        The words that visual tokens spell with; None where no answer is short enough to be spelt.
    """
    config = job.config
    assert isinstance(config, TuneConfig)
    grounding = GroundingObjective(
        objective.model,
        objective.data,
        together=config.grounding_questions,
        filler=config.grounding_filler,
        repeat=config.grounding_repeat,
        spelling=config.grounding_spelling,
        tokens_seen=config.grounding_tokens,
        channels_seen=config.grounding_channels,
        seed=job.seed,
    )
    if not grounding.num_samples():
        return None  # every answer is longer than the visual tokens: nothing that can be spelt
    own = config.model_copy(
        update={
            "steps": config.grounding_steps,
            "batch_size": config.grounding_batch_size // config.grounding_questions,
            "learning_rate": config.grounding_learning_rate,
            "accumulate": 1,
        }
    )
    train(grounding, replace(job, stage="ground", config=own, max_steps=None))
    if config.anchoring_steps:
        share = refit_projection(grounding, batch_size=own.batch_size)
        job.run.log("refit", 1, explained_variance=round(share, 4))
        grounding.anchor = config.anchoring_weight
        if config.anchoring_repeat is not None:
            grounding.group(config.anchoring_repeat)
        own = own.model_copy(update={"steps": config.anchoring_steps})
        train(grounding, replace(job, stage="anchor", config=own, max_steps=None))
    if config.grounding_kept:
        grounding.anchor = config.anchoring_weight
        objective.kept = KeptSpelling(
            grounding.fits, grounding.spelling_loss, config.grounding_kept
        )
    return grounding.words


def calibrate(objective: TuneObjective, *, num_samples: int, is_aligned: bool) -> None:
    """Start the fresh projection, and without stage 1 the cross-attention, at the data's scale."""
    if num_samples < 2:
        return
    model = objective.model
    batch = objective.collate(range(min(num_samples, objective.num_samples())))
    bridge = model.bridge.to(model.device.device)
    features = batch.features.to(model.device.device)
    if not is_aligned:
        calibrate_image(bridge, features)
    with torch.no_grad():
        prefix = model.visual_prefix(features, batch.questions).float()
    mean, std = model.language.embedding_statistics()
    calibrate_projection(bridge, prefix, mean=mean, std=std)
