"""The verbs of this room: `clover score` and `clover evaluate`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from clover.core.options import feature_option


@click.command(epilog="Example: clover score predictions.jsonl --protocol strict,llava-med,quilt")
@click.argument("predictions", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path), required=False)
@click.option(
    "--protocol",
    default="strict",
    show_default=True,
    help="Comma-separated: strict, llava-med, llava-med-batch, llava-med-pvqa, quilt, "
    "pathvqa-official.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, by protocol.")
@click.option(
    "--per-item",
    type=click.Path(path_type=Path),
    help="Write one JSON line an item and protocol: the ratings as fractions, and BLEU.",
)
@click.option(
    "--truth",
    type=click.Path(path_type=Path),
    help="Take question, answer and answer_type from this file, by id.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Compare with another prediction file for the same items; the same as OTHER.",
)
@click.option(
    "--train",
    type=click.Path(path_type=Path),
    help="Training questions with answers: expose answers that are copied from them.",
)
@click.option(
    "--trainable",
    type=float,
    help="Trainable parameters (187e6): also print score / log10(millions).",
)
@click.option("--draws", default=1000, show_default=True, type=click.IntRange(0, 100_000))
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the bootstrap draws."
)
def score(
    predictions: Path, other: Path | None, protocol: str, as_json: bool, **options: Any
) -> None:
    """Score anybody's PREDICTIONS: a JSON line is id, question, answer, answer_type, prediction.

    With OTHER, a second file of predictions for the same items, the difference is tested in pairs.

    Further fields are used where there are any: yes_no_answer (QUILT-VQA), image (questions about
    one image are drawn together for the intervals), form (questions of one form share a
    question-only baseline). Without answer_type, an item is closed if its answer is yes or no.
    Warnings go to stderr.
    """
    from clover.evaluate.score import compare_files, num_workers, read_sheet, score_sheet
    from clover.evaluate.table import comparison_lines, score_lines

    draws, seed, truth = options["draws"], options["seed"], options["truth"]
    against = options["against"] if other is None else other
    rated = read_sheet(
        predictions,
        protocol,
        truth=truth,
        train=options["train"],
        per_item=options["per_item"],
        workers=num_workers(predictions),
    )
    second = None if against is None else read_sheet(against, protocol, truth=truth)
    scores = score_sheet(*rated, draws=draws, seed=seed, trainable_parameters=options["trainable"])
    comparison = None if second is None else compare_files(rated, second, draws=draws, seed=seed)
    for line in dict.fromkeys(
        warning for found in scores.values() for warning in found["details"]["warnings"]
    ):
        click.echo(f"clover: {line}", err=True)
    for line in [] if second is None else second[1].problems.lines():
        click.echo(f"clover: {against}: {line}", err=True)
    if as_json:
        if comparison is not None:
            for name, found in comparison.items():
                scores[name]["against"] = {"file": str(against), **found}
        click.echo(json.dumps(scores, indent=2, allow_nan=False, default=str))
        return
    click.echo("\n".join(score_lines(scores)))
    if comparison is not None and against is not None:
        click.echo("\n" + "\n".join(comparison_lines(comparison, against.name)))


@click.command(
    epilog="Example: clover evaluate model/ --data vqa_val.jsonl --out evaluation/ --controls"
)
@click.argument("model", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Questions with answers."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("evaluation"),
    show_default=True,
    help="Where predictions and scores.json go.",
)
@click.option(
    "--controls",
    is_flag=False,
    flag_value="basic",
    metavar="[NAMES]",
    help="Ask also without the image: basic (blind, shuffled, noise), all, or some of them, "
    "comma-separated; all adds grey, stain, jpeg, turned, mirrored, paraphrase.",
)
@click.option(
    "--control-items", type=click.IntRange(0), default=0, help="Questions a control; 0 = all."
)
@click.option(
    "--decoding",
    help="recipe (default), paper (5 beams, 5 to 40 tokens), or sense (greedy; closed questions "
    "get the likelier of yes and no).",
)
@click.option("--predict-only", is_flag=True, help="Write the predictions and score nothing.")
@click.option(
    "--train",
    type=click.Path(path_type=Path),
    help="Training questions: adds the colour-only baseline and the linear probe; refused where "
    "they share an image with --data.",
)
@click.option("--allow-leaks", is_flag=True, help="Go on when --train and --data share images.")
@click.option("--images", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--endpoint", metavar="URL", help="Ask an OpenAI-compatible endpoint in place of MODEL."
)
@click.option("--model", "peer", metavar="M", help="The model's name at the endpoint.")
@click.option("--concurrency", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--microns-per-pixel",
    type=click.FloatRange(0, min_open=True),
    help="At which regions of slides are read for the endpoint; a MODEL folder states its own.",
)
@click.option("--closed-suffix", default="", help="Added to closed questions put to the endpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print scores.json.")
@feature_option
def evaluate(model: Path | None, data: Path, out: Path, **options: Any) -> None:
    """Ask MODEL the questions of a file and score its answers by the strict rule.

    Writes OUT/predictions.jsonl (rescore it with clover score) and OUT/scores.json, and continues
    where it stopped when called again. With --controls it says how much of the score is owed to
    the image. With --endpoint URL --model M the questions and images go there instead, and nowhere
    else. Research use only, not for diagnosis.

    \b
    Example:
      clover evaluate model/ --data vqa_val.jsonl --controls all --control-items 200
      clover evaluate --endpoint http://127.0.0.1:8000/v1 --model peer --data vqa_val.jsonl
    """
    from clover.evaluate.summary import control_lines, evaluation_lines, form_lines

    if (model is None) == (options["endpoint"] is None):
        raise click.UsageError("name either a MODEL folder or --endpoint URL with --model M")
    if model is not None:
        if options["microns_per_pixel"] is not None:
            raise click.UsageError(
                "--microns-per-pixel is for --endpoint; of a MODEL folder, set "
                "encoder.microns_per_pixel in its config.json"
            )
        scores = _folder_scores(model, data, out, options)
    else:
        scores = _endpoint_scores(data, out, options)
    if scores is None:
        written = out / "predictions.jsonl"
        click.echo(f"{written}; next: clover score {shlex.quote(str(written))}")
        return
    if options["as_json"]:
        click.echo(json.dumps(scores, ensure_ascii=False))
        return
    click.echo(scores["details"]["data"])
    for line in evaluation_lines(scores):
        click.echo(line)
    if options["controls"] is not None:
        for line in (*control_lines(scores), *form_lines(scores)):
            click.echo(line)
    click.echo(f"{out / 'scores.json'}; research use only, not for diagnosis")


def _folder_scores(
    model: Path, data: Path, out: Path, options: dict[str, Any]
) -> dict[str, Any] | None:
    from clover.evaluate.run import evaluate_folder
    from clover.evaluate.view import find_controls

    return evaluate_folder(
        model,
        data=data,
        out=out,
        cache=options["cache"],
        images=options["images"],
        train=options["train"],
        controls=find_controls(options["controls"]),
        control_items=options["control_items"],
        decoding=options["decoding"],
        check_leaks=not options["allow_leaks"],
        predict_only=options["predict_only"],
    )


def _endpoint_scores(data: Path, out: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    from clover.evaluate.endpoint import EndpointModel
    from clover.evaluate.run import evaluate_endpoint
    from clover.evaluate.view import find_controls
    from clover.vision.dataset import load_image_set

    for name in ("train", "decoding"):
        if options[name] is not None:
            raise click.UsageError(f"--{name} is for a MODEL folder, not for --endpoint")
    if not options["peer"]:
        raise click.UsageError("--endpoint needs --model M, the model's name there")
    controls = find_controls(options["controls"])
    respondent = EndpointModel(
        options["endpoint"],
        options["peer"],
        load_image_set(
            data,
            options["images"],
            needs="question",
            microns_per_pixel=options["microns_per_pixel"],
        ),
        max_tokens=options["max_tokens"],
        concurrency=options["concurrency"],
        closed_suffix=options["closed_suffix"],
        microns_per_pixel=options["microns_per_pixel"],
    )
    return evaluate_endpoint(
        respondent,
        out=out,
        controls=controls,
        control_items=options["control_items"],
        predict_only=options["predict_only"],
    )
