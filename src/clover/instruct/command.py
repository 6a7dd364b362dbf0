"""`clover instruct`: generate, template, filter, mix, stats, ledger."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clover.core.errors import CloverError
from clover.core.finite import NOT_NEGATIVE, POSITIVE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clover.core.record import Record, RecordSet
    from clover.instruct.blind import BlindAnswers
    from clover.instruct.generate import GenerateSettings, GenerateSummary

_FILE = click.Path(path_type=Path)
_REJECTED = ("rejected.jsonl",)
"""What is written beside --out, behind its name."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def instruct() -> None:
    """Captions in, checked instructions out, every cent accounted.

    \b
    Example:
      clover instruct template captions.csv --out template.jsonl
      clover instruct generate captions.csv --out generated.jsonl \\
          --endpoint http://127.0.0.1:8000/v1 --model my-model --budget 8
      clover instruct filter generated.jsonl --out good.jsonl
      clover instruct mix good.jsonl template.jsonl --out hybrid.jsonl
    """


@instruct.command()
@click.argument("captions", type=_FILE)
@click.option("--out", required=True, type=_FILE, help="JSONL to write; F.ledger.sqlite beside it.")
@click.option("--endpoint", required=True, help="OpenAI-compatible URL, usually ending in /v1.")
@click.option("--model", required=True, help="The model's name at the endpoint.")
@click.option("--prompt", default="published-v1", show_default=True, help="Prompt name or YAML.")
@click.option("--budget", type=NOT_NEGATIVE, help="Hard cap in US dollars, over all its runs.")
@click.option("--price", help="input,output in dollars per million tokens.")
@click.option("--limit", type=int, help="Ask about the first N captions only.")
@click.option("--concurrency", type=int, default=16, show_default=True, help="Requests in flight.")
@click.option("--timeout", type=POSITIVE, default=120.0, show_default=True, help="Seconds a reply.")
@click.option(
    "--attempts",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Times a caption is sent.",
)
@click.option("--key-env", default="OPENAI_API_KEY", show_default=True, help="Holds the API key.")
@click.option("--retry-failed", is_flag=True, help="Ask again about captions failed for good.")
@click.option("--any-language", is_flag=True, help="Keep captions that are not in English.")
@click.option("--batch", is_flag=True, help="Batch API: half the price, within a day.")
@click.option(
    "--poll", type=POSITIVE, default=30.0, show_default=True, help="Seconds, for --batch."
)
@click.option("--workers", type=int, default=1, show_default=True, help="Processes to use.")
@click.option("--ray", is_flag=True, help="Run the workers under Ray (extra [ray], RAY_ADDRESS).")
@click.option("--dry-run", is_flag=True, help="Predict dollars and hours; send nothing.")
def generate(
    captions: Path,
    out: Path,
    dry_run: bool,
    price: str | None,
    workers: int,
    ray: bool,
    **options: Any,
) -> None:
    """Generate question and answer pairs from captions with a language model.

    Text goes to the endpoint you name and nowhere else. The same command again continues and pays
    for nothing twice.

    \b
    Example:
      clover instruct generate captions.csv --out generated.jsonl \\
          --endpoint http://127.0.0.1:11434/v1 --model llama3.1:8b --prompt structured-v1
    """
    from clover.core.files import check_out
    from clover.instruct.generate import generate_file, plan_file

    settings = _settings(price, **options)
    check_out(out, captions, beside=("failed.jsonl", "rejected.jsonl"))
    if dry_run:
        plan = plan_file(captions, out=out, settings=settings)
        click.echo(
            f"{plan.requests:,} requests for {plan.captions:,} captions "
            f"({plan.set_aside:,} set aside{_in_batch(plan.waiting)}); "
            f"about {plan.input_tokens:,} tokens in, {plan.output_tokens:,} out (from {plan.basis})"
        )
        click.echo(
            f"about ${plan.usd:.4f} at ${plan.price.input_usd:g} in, ${plan.price.output_usd:g} "
            f"out per million ({plan.price.source}); {_duration(plan.hours, settings)}. "
            "Nothing was sent."
        )
        return
    if workers == 1 and not ray:
        _report(generate_file(captions, out=out, settings=settings), out)
        return
    from clover.core.cluster import import_ray
    from clover.instruct.shard import generate_in_shards
    from clover.instruct.workers import run_locally, run_under_ray

    if ray:
        import_ray()  # its absence shows before anything is sent
    runner = run_under_ray if ray else run_locally
    summary = generate_in_shards(
        captions, out=out, settings=settings, workers=workers, runner=runner
    )
    _report(summary, out)


def _duration(hours: float, settings: GenerateSettings) -> str:
    if settings.batch:
        return "within a day a batch"
    return f"about {hours:.2f} hours at {settings.concurrency} in flight"


def _settings(price: str | None, *, batch: bool, poll: float, **options: Any) -> GenerateSettings:
    from clover.instruct.batch import BatchSettings
    from clover.instruct.generate import GenerateSettings
    from clover.instruct.prices import parse_price

    renamed = {"budget": "budget_usd", "timeout": "timeout_s"}
    fields = {renamed.get(name, name): value for name, value in options.items()}
    return GenerateSettings(
        price=parse_price(price) if price else None,
        batch=BatchSettings(poll_s=poll) if batch else None,
        **fields,
    )


def _in_batch(waiting: int) -> str:
    return f", {waiting:,} wait in an open batch, which --batch takes up" if waiting else ""


def _report(summary: GenerateSummary, out: Path) -> None:
    from clover.instruct.ledger import ledger_path

    lost = f" + at most ${summary.lost_usd:.4f} for replies lost" if summary.lost_usd else ""
    click.echo(
        f"{summary.pairs:,} pairs from {summary.done:,} of {summary.asked:,} captions -> {out}; "
        f"{summary.failed:,} failed, {summary.left:,} left, {summary.set_aside:,} set aside"
        f"{_in_batch(summary.waiting)}; "
        f"{summary.sent:,} requests sent in {summary.seconds:.1f} s"
    )
    click.echo(
        f"{summary.input_tokens:,} tokens in, {summary.output_tokens:,} out, "
        f"${summary.usd:.4f}{lost} ({ledger_path(out)})"
    )
    if summary.failed:
        click.echo(f"reasons of failures: {out}.failed.jsonl")
    if summary.set_aside:
        click.echo(f"captions set aside, with reasons: {out}.rejected.jsonl")
    if summary.stopped:
        raise CloverError(
            f"{summary.stopped}: {summary.left:,} captions are left; raise --budget and run the "
            "same command again"
        )
    if summary.asked and not summary.done and not summary.waiting:
        kept = f"; {out} is as it was" if out.exists() else ""
        raise CloverError(f"no caption brought a usable reply; see {out}.failed.jsonl{kept}")


@instruct.command()
@click.argument("captions", type=_FILE)
@click.option("--out", required=True, type=_FILE, help="JSONL to write.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the wordings.")
@click.option("--limit", type=int, help="The first N captions only.")
@click.option("--any-language", is_flag=True, help="Keep captions that are not in English.")
def template(captions: Path, out: Path, seed: int, limit: int | None, any_language: bool) -> None:
    """Write template-based instructions: the answer is the cleaned caption. Free, offline.

    \b
    Example:
      clover instruct template captions.csv --out template.jsonl
    """
    from clover.core.files import check_out
    from clover.core.record import write_records
    from clover.instruct.caption import Captions
    from clover.instruct.template import write_template_instructions

    if limit is not None and limit < 1:
        raise CloverError(f"--limit {limit} is less than 1")
    check_out(out, captions, beside=_REJECTED)
    source = Captions(captions, any_language, limit, out=out)
    records = list(source)
    instructions = write_template_instructions(records, seed=seed)
    if not instructions:
        raise CloverError(f"{captions} holds no caption that can be asked about")
    write_records(out, instructions)
    source.write_rejected(f"{out}.rejected.jsonl")
    kinds = Counter(str(getattr(record, "template", "")) for record in instructions)
    listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    click.echo(f"{len(instructions):,} instructions from {len(records):,} captions -> {out}")
    click.echo(listed)
    if source.num_rejected:
        click.echo(f"set aside: {_listed(source.reasons)} ({out}.rejected.jsonl)")


@instruct.command("filter")
@click.argument("file", type=_FILE)
@click.option("--out", required=True, type=_FILE, help="JSONL to write.")
@click.option(
    "--captions",
    type=_FILE,
    help="Captions of the images, one or more each, when the records carry none.",
)
@click.option("--review", type=_FILE, help="JSONL of {id, verdict} from the stats page.")
@click.option(
    "--min-overlap",
    type=float,
    default=0.6,
    show_default=True,
    help="Share of an answer's words that the caption must hold.",
)
@click.option("--blind-endpoint", help="Ask the questions of a model there that sees no image.")
@click.option("--blind-model", help="The model's name at that endpoint.")
@click.option("--blind-closed", is_flag=True, help="Ask it yes/no questions too, five times each.")
@click.option("--blind-budget", type=NOT_NEGATIVE, help="Hard cap in US dollars, over all runs.")
@click.option("--blind-price", help="input,output in dollars per million tokens.")
@click.option("--blind-key-env", default="OPENAI_API_KEY", show_default=True, help="The API key.")
def filter_file(
    file: Path,
    out: Path,
    captions: Path | None,
    review: Path | None,
    min_overlap: float,
    **blind: Any,
) -> None:
    """Keep the good pairs; list every other one with the rule that turned it away.

    With --blind-endpoint, a question that a language model answers rightly without the image is
    turned away too; only questions leave the machine, and none is paid twice (G.ledger.sqlite).

    \b
    Example:
      clover instruct filter generated.jsonl --out good.jsonl
      # what was turned away, and why: good.jsonl.rejected.jsonl
      clover instruct filter generated.jsonl --out good.jsonl \\
          --blind-endpoint http://127.0.0.1:11434/v1 --blind-model llama3.1:8b
    """
    from clover.core.files import check_out, write_json
    from clover.core.record import read_records, write_records, write_rejected
    from clover.instruct.costs import card_path, ledgers_of, total_usd
    from clover.instruct.filter import filter_records, rule_counts

    if not 0 <= min_overlap <= 1:
        raise CloverError(f"--min-overlap {min_overlap:g} is not between 0 and 1")
    asking = _blind_settings(**blind)
    check_out(out, *filter(None, (file, captions, review)), beside=(*_REJECTED, "card.json"))
    # Of generating; the blind test's own ledger lies beside `out`. What is no card or ledger shows
    # here, before anything is asked and paid.
    costs = ledgers_of([file], out=out)
    records = read_records(file, needs="question")
    found, has_moved = _moved(records, out)
    by_image = None
    if captions is not None:
        by_image = _captions(captions, records, found, has_moved, out)
    reviewed = _verdicts(review) if review is not None else None
    kept, rejected = filter_records(
        found, captions=by_image, reviewed=reviewed, min_overlap=min_overlap
    )
    if asking is not None:
        from clover.instruct.blind import ask_blind, reject_blind

        by_hand = {key for key, verdict in (reviewed or {}).items() if verdict == "keep"}
        known = [record for record in kept if record.id not in by_hand]
        answers = ask_blind(known, out=out, settings=asking, closed=blind["blind_closed"])
        kept, guessed = reject_blind(kept, answers, source=found)
        rejected += guessed
    rejected = [*records.rejected, *rejected]
    write_records(out, kept)
    rejected_file = Path(f"{out}.rejected.jsonl")
    rejected_file.unlink(missing_ok=True)
    write_rejected(rejected_file, rejected)
    card = {"records": len(kept), "rejected": dict(rule_counts(rejected).most_common())}
    write_json(card_path(out), {**card, "usd": total_usd(costs), "ledgers": costs})
    total = len(kept) + len(rejected)
    click.echo(f"{len(kept):,} of {total:,} pairs kept ({len(kept) / total:.1%}) -> {out}")
    if rejected:
        click.echo(f"turned away: {_listed(rule_counts(rejected))} ({rejected_file})")
    unchecked = sum(
        not record.caption and not (by_image or {}).get(record.image or "") for record in kept
    )
    if unchecked:
        click.echo(f"{unchecked:,} kept without a caption to check the answer against")
    if asking is not None:
        _report_blind(answers, out)


def _moved(found: RecordSet, out: Path) -> tuple[list[Record], bool]:
    """Return records with their images named from the folder of the file they go to.

    And whether they are: where no image lies beside its file, names stay.
    """
    from clover.core.image_names import image_move

    move = image_move(found.records, source=found.path, out=out)
    if move is None:
        return found.records, False
    return [move(record) for record in found.records], True


def _captions(
    path: Path, records: RecordSet, moved: Sequence[Record], has_moved: bool, out: Path
) -> dict[str, list[str]]:
    """Return the captions of records by image, as `_moved` names them.

    Where either file's images do not lie beside it, both call an image by the same name.
    """
    from clover.core.image_names import image_move
    from clover.core.record import Record, iterate_records
    from clover.instruct.filter import captions_by_image

    # Captions that share an id count too: only their images matter here.
    known = [item for item in iterate_records(path, needs="caption") if isinstance(item, Record)]
    move = image_move(known, source=path, out=out) if has_moved else None
    called = records.records if move is None else moved
    captions = captions_by_image(known if move is None else map(move, known))
    return {
        new.image: captions[old.image]
        for new, old in zip(moved, called, strict=True)
        if new.image and old.image in captions
    }


def _blind_settings(**blind: Any) -> GenerateSettings | None:
    from clover.instruct.generate import GenerateSettings
    from clover.instruct.prices import parse_price

    endpoint, model = blind["blind_endpoint"], blind["blind_model"]
    if not endpoint or not model:
        if any(blind[name] for name in ("blind_endpoint", "blind_model", "blind_closed")):
            raise CloverError("the blind test needs both --blind-endpoint and --blind-model")
        return None
    price = blind["blind_price"]
    return GenerateSettings(
        endpoint=endpoint,
        model=model,
        budget_usd=blind["blind_budget"],
        price=parse_price(price) if price else None,
        key_env=blind["blind_key_env"],
    )


def _report_blind(answers: BlindAnswers, out: Path) -> None:
    from clover.instruct.ledger import Ledger, ledger_path

    with Ledger(ledger_path(out)) as books:
        usd = books.totals().usd
    kinds: Counter[str] = Counter(kind for kind, _ in answers.replies)
    click.echo(
        f"asked without the image: {_listed(kinds) or 'nothing'} questions, "
        f"{answers.sent:,} requests sent, ${usd:.4f} in all ({ledger_path(out)})"
    )
    if answers.unanswered:
        click.echo(f"{answers.unanswered:,} questions brought no answer and are kept")
    if answers.habit:
        click.echo(
            f"the model says '{answers.habit}' whatever it is asked: no yes/no question was "
            "turned away for it"
        )


def _verdicts(path: Path) -> dict[str, str]:
    verdicts = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for line in filter(str.strip, lines):
            row = json.loads(line)
            verdicts[str(row["id"])] = str(row["verdict"])
    except FileNotFoundError as error:
        raise CloverError(f"no file {path}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CloverError(
            f'{path} is not a review: each line is {{"id": ..., "verdict": "keep" or "reject"}}'
        ) from error
    unknown = set(verdicts.values()) - {"keep", "reject"}
    if unknown:
        raise CloverError(f"{path}: verdict '{min(unknown)}' is neither keep nor reject")
    return verdicts


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common())


@instruct.command()
@click.argument("files", type=_FILE, nargs=-1, required=True)
@click.option("--out", required=True, type=_FILE, help="JSONL to write.")
@click.option(
    "--share",
    multiple=True,
    help="file=0.8, by file name without ending; repeat. A file without one is left out.",
)
@click.option("--per-image", type=int, help="Most questions about one image.")
@click.option("--per-body-part", type=float, help="Largest share of one body part.")
@click.option("--val", type=float, default=0.0, show_default=True, help="Share of image groups.")
@click.option("--no-balance", is_flag=True, help="Leave yes and no as they are.")
@click.option("--seed", type=int, default=0, show_default=True, help="Choice, order and split.")
def mix(files: tuple[Path, ...], out: Path, share: tuple[str, ...], **options: object) -> None:
    """Mix files into one hybrid set, with a data card beside it (H.card.json).

    \b
    Example:
      clover instruct mix good.jsonl template.jsonl --out hybrid.jsonl \\
          --share good=0.7 --share template=0.3 --per-image 6 --val 0.1
    """
    from clover.core.files import check_out, write_json
    from clover.core.record import read_records, write_records
    from clover.instruct.costs import card_path, ledgers_of
    from clover.instruct.mix import MixSettings, data_card, first_names, mix_records

    check_out(out, *files, beside=("card.json",))
    costs = ledgers_of(files, out=out)  # what is no card or ledger shows before anything is written
    shares = _shares(share)  # before the files are read: they may be large
    sets: dict[str, RecordSet] = {}
    for file in files:
        if file.stem in sets:
            raise CloverError(f"two files are called {file.stem}; rename one of them")
        sets[file.stem] = read_records(file, needs="question")
    seed = int(str(options["seed"]))
    settings = MixSettings(
        per_image=options["per_image"],  # type: ignore[arg-type]
        per_body_part=options["per_body_part"],  # type: ignore[arg-type]
        validation_share=float(str(options["val"])),
        balance=not options["no_balance"],
    )
    sources = {name: _moved(found, out)[0] for name, found in sets.items()}
    names = first_names(
        pair
        for name, found in sets.items()
        for pair in zip(found.records, sources[name], strict=True)
    )
    mixed = mix_records(sources, shares=shares, seed=seed, settings=settings, names=names)
    write_records(out, mixed)
    counts = {name: len(records) for name, records in sources.items()}
    card = data_card(mixed, sources=counts, costs=costs, seed=seed)
    write_json(card_path(out), card)
    click.echo(f"{len(mixed):,} instructions -> {out}; data card: {card_path(out)}")
    for name in ("origin", "answer_type", "yes_no", "split"):
        click.echo(f"{name}: {_listed(Counter(card.get(name, {})))}")
    left = [name for name in sources if shares is not None and name not in shares]
    if left:
        click.echo(f"left out, because --share names others alone: {', '.join(left)}")
    aside = {name: found for name, found in sets.items() if found.rejected}
    for name, found in aside.items():
        click.echo(f"{name}: {found.summary()}")


def _shares(texts: tuple[str, ...]) -> dict[str, float] | None:
    shares = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            shares[name] = float(value)
        except ValueError:
            name = ""
        if name and not math.isfinite(shares[name]):
            raise CloverError(f"--share '{text}' is not a finite number")
        if not name:
            raise CloverError(
                f"--share '{text}' is not of the form name=0.8, where name is a file's without "
                "its ending"
            )
    return shares or None


@instruct.command()
@click.argument("path", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def ledger(path: Path, as_json: bool) -> None:
    """Show what was spent: requests, done, failed, tokens, dollars; by model, day and outcome.

    \b
    Example:
      clover instruct ledger generated.jsonl --json
    """
    from clover.instruct.ledger import Ledger, ledger_path
    from clover.instruct.merge import unmerged_shards

    left = unmerged_shards(Path(str(path).removesuffix(".ledger.sqlite")))
    if left:
        click.echo(
            f"{len(left):,} shards are not counted yet; the same generate command merges them",
            err=True,
        )
    with Ledger(ledger_path(path), must_exist=True) as books:
        totals, rows, failures = books.totals(), books.breakdown(), books.failures()
    if as_json:
        by = {"by": rows, "failures": dict(failures)}
        click.echo(json.dumps({**totals.row(), **by}, indent=2))
        return
    for name, value in totals.row().items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.6f}"
        click.echo(f"{name:<20}{shown:>16}")
    click.echo()
    for row in rows:
        click.echo(
            f"{row['model']}  {row['day']}  {row['outcome']}: {row['attempts']:,} attempts, "
            f"{row['input_tokens']:,} in, {row['output_tokens']:,} out, ${float(row['usd']):.6f}"
        )
    for reason, count in failures:
        click.echo(f"failed {count:,}: {reason}")


@instruct.command()
@click.argument("file", type=_FILE)
@click.option("--out", required=True, type=_FILE, help="HTML page to write.")
@click.option(
    "--samples",
    type=click.IntRange(0),
    default=40,
    show_default=True,
    help="Shown for review.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which samples.")
def stats(file: Path, out: Path, samples: int, seed: int) -> None:
    """Describe an instruction set on one HTML page, with samples to review by hand.

    \b
    Example:
      clover instruct stats hybrid.jsonl --out stats.html
    """
    from clover.core.files import check_out
    from clover.core.record import read_records
    from clover.instruct.statistics import facts, write_statistics

    check_out(out, file)
    found = read_records(file, needs="question")
    write_statistics(found.records, out=out, title=file.name, samples=samples, seed=seed)
    click.echo(", ".join(f"{name} {value}" for name, value in facts(found.records)))
    if found.rejected:
        click.echo(found.summary())
    click.echo(f"-> {out}")
