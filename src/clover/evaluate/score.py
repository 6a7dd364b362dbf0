"""Scores of anybody's predictions: `clover.score`, without torch.

In: prediction lines (see `clover.evaluate.item`). Out: per protocol the closed and open scores in
percent, each with n and a 95 % interval, and the details that say how to read them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clover.core.errors import CloverError
from clover.core.files import write_jsonl
from clover.core.run import num_processors
from clover.evaluate.copied import TrainingAnswers
from clover.evaluate.interval import mcnemar, paired_bootstrap
from clover.evaluate.item import ItemReader, Problems, read_rows, read_truth, spoken
from clover.evaluate.protocol import Item, find_protocols
from clover.evaluate.sheet import SCORE_KEYS, Sheet, rated_rows

_LARGE = 32 << 20
"""Bytes of predictions from which starting further processes, half a second, pays."""
_MOST_WORKERS = 4
"""One process reads, and is busy when four rate."""

__all__ = [
    "compare_files",
    "mcnemar",
    "paired_bootstrap",
    "per_log_parameters",
    "read_sheet",
    "score",
    "score_file",
    "score_sheet",
]


def score(
    items: Iterable[Any],
    protocol: str | Sequence[str] = "strict",
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score predictions.

    Args:
        items: Mappings with id, question, answer, answer_type, prediction (and yes_no_answer,
            image, group, form where there are any), or records with these as fields.
        protocol: A name; or several, as a list or separated by commas.
        draws: Bootstrap draws for the intervals; 0 gives none.
        seed: Of the draws.

    Returns:
        For one name: closed, open_recall, open_precision, open_f1, open_exact, each with value
        (percent), n, low, high; and details. For several: such a dictionary a protocol.

    Raises:
        CloverError: an unknown protocol, or not one item that can be scored.
    """
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise CloverError(
            f"items is a {type(items).__name__}; give a list of mappings with id, question, answer "
            "and prediction, or a file's path to clover.evaluate.score.score_file"
        )
    sheet = Sheet(find_protocols(protocol))
    reader = ItemReader()
    sheet.fill(reader.items(_row(item) for item in items))
    found = score_sheet(sheet, reader, draws=draws, seed=seed)
    is_single = isinstance(protocol, str) and "," not in protocol
    return found[sheet.protocols[0].name] if is_single else found


def score_file(
    path: str | Path,
    protocol: str | Sequence[str] = "strict",
    *,
    truth: str | Path | None = None,
    train: str | Path | None = None,
    per_item: str | Path | None = None,
    draws: int = 1000,
    seed: int = 0,
    workers: int = 1,
) -> dict[str, dict[str, Any]]:
    """Score a prediction file; return one dictionary as `score` gives a protocol.

    Args:
        path: Prediction lines.
        protocol: One name or several.
        truth: A file with the answers, matched by id; without it the lines carry them.
        train: The training questions with answers, to expose answers copied from them.
        per_item: Where to write one JSON line an item and protocol.
        draws: Bootstrap draws.
        seed: Of the draws.
        workers: Processes that rate, without `per_item`. More than one are spawned: the calling
            script needs its `if __name__ == "__main__"`.

    Raises:
        CloverError: a file that cannot be read, another split's truth, nothing to score.
    """
    sheet, reader = read_sheet(
        path, protocol, truth=truth, train=train, per_item=per_item, workers=workers
    )
    return score_sheet(sheet, reader, draws=draws, seed=seed)


def read_sheet(
    path: str | Path,
    protocol: str | Sequence[str] = "strict",
    *,
    truth: str | Path | None = None,
    train: str | Path | None = None,
    per_item: str | Path | None = None,
    workers: int = 1,
) -> tuple[Sheet, ItemReader]:
    """Rate every item of a prediction file; arguments as `score_file`.

    Raises:
        CloverError: as `score_file`.
    """
    sheet = Sheet(find_protocols(protocol), None if train is None else read_training(train))
    problems = Problems()
    reader = ItemReader(read_truth(truth, problems) if truth is not None else None)
    reader.problems.merge(problems)
    items = reader.items(read_rows(path, reader.problems))
    if per_item is None:
        sheet.fill(items, workers=workers)
    else:
        write_jsonl(per_item, rated_rows(sheet, items))
    if not len(sheet):
        raise CloverError(f"{path}: {_nothing(reader)}")
    return sheet, reader


def num_workers(path: Path) -> int:
    """Return how many processes should rate a file: as many as there are cores, for a large one."""
    if not path.is_file() or path.stat().st_size < _LARGE:
        return 1
    return min(_MOST_WORKERS, num_processors())


def read_training(path: str | Path) -> TrainingAnswers:
    """Read training questions with their answers.

    Raises:
        CloverError: no such file, or no line with a question and an answer.
    """
    training = TrainingAnswers(map(spoken, read_rows(path, Problems())))
    if not len(training):
        raise CloverError(f"{path} holds no line with a question and an answer to copy from")
    return training


def _nothing(reader: ItemReader) -> str:
    reasons = "; ".join(reader.problems.lines()) or "there are no prediction lines"
    fix = "" if reader.truth is not None else "; or name a file with the answers: --truth FILE"
    return f"nothing can be scored: {reasons}; a line is id, question, answer, prediction{fix}"


def score_sheet(
    sheet: Sheet,
    reader: ItemReader,
    *,
    draws: int = 1000,
    seed: int = 0,
    trainable_parameters: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the scores of rated items by protocol, with warnings and header in their details.

    Raises:
        CloverError: no item, or too few trainable parameters to divide by their logarithm.
    """
    if not len(sheet):
        raise CloverError(_nothing(reader))
    scores = sheet.scores(draws=draws, seed=seed)
    header, not_finite = _finite(reader.header)
    for protocol in sheet.protocols:
        found = scores[protocol.name]
        details = found["details"]
        details["warnings"] = [
            *([protocol.warning] if protocol.warning else []),
            *reader.problems.lines(),
            *not_finite,
            *_gaps(details),
        ]
        details["known_set"] = sheet.count.known_as()
        if header is not None:
            details["header"] = header
        if trainable_parameters is not None:
            details["trainable_parameters"] = trainable_parameters
            details["per_log_parameters"] = {
                key: per_log_parameters(found[key]["value"], trainable_parameters)
                for key in SCORE_KEYS
                if found[key]["value"] is not None
            }
    return scores


def _finite(header: dict[str, Any] | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Return a header that JSON can hold: NaN and infinities as null, and a line that says so."""
    found: list[str] = []
    text = json.dumps(header, default=str, skipkeys=True)
    finite = json.loads(text, parse_constant=found.append)  # append returns None: null
    names = ", ".join(dict.fromkeys(found))
    return finite, [f"the header holds {names}: null in the scores"] * bool(found)


def _gaps(details: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each score that cannot be given."""
    if not details["num_closed"]:
        yield "no closed items: no closed score"
    elif details["unscorable"] == details["num_closed"]:
        yield f"{details['protocol']} gives no closed score to these items"
    elif details["unscorable"]:
        yield (
            f"{details['unscorable']:,} closed items have neither yes nor no as their truth: "
            f"not scored under {details['protocol']}"
        )
    if not details["num_open"]:
        yield "no open items: no open scores"
    if details["clusters"] < 2:
        yield "one item, or one image for all: no interval"


def _row(item: Any) -> Mapping[str, Any]:
    if isinstance(item, Item):
        return {**item._asdict(), "answer_type": "closed" if item.is_closed else "open"}
    if isinstance(item, Mapping):
        return item
    if hasattr(item, "row"):
        row: Mapping[str, Any] = item.row()
        return row
    raise CloverError(
        f"an item is a {type(item).__name__}; a mapping with id, question, answer, prediction is "
        "needed"
    )


def compare_files(
    first: tuple[Sheet, ItemReader], second: tuple[Sheet, ItemReader], *, draws: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Compare two rated files over the items that both hold: first minus second, in points.

    Returns:
        By protocol and score the paired bootstrap's figures, closed with McNemar's test beside,
        and pairs: how many items both files hold.

    Raises:
        CloverError: the files share no id, or ask other questions under the same ids.
    """
    sheet, other = first[0], second[0]
    places = {str(identity): place for place, identity in enumerate(other.ids)}
    pairs = [
        (place, places[str(identity)])
        for place, identity in enumerate(sheet.ids)
        if str(identity) in places
    ]
    if not pairs:
        raise CloverError(
            f"the two files share none of their {len(sheet):,} and {len(other):,} ids; "
            "a paired comparison needs predictions for the same items"
        )
    ours, theirs = (list(column) for column in zip(*pairs, strict=True))
    num_others = sheet.witness.num_others(other.witness, ours, theirs)
    if num_others * 10 > len(pairs):
        raise CloverError(
            f"{num_others:,} of the {len(pairs):,} shared ids have another question and another "
            "truth in the other file; a paired comparison needs predictions for the same items"
        )
    names = sheet.cluster_names()
    clusters = [names[place] for place in ours]
    result: dict[str, dict[str, Any]] = {}
    for protocol in sheet.protocols:
        left, right = sheet.columns(protocol.name)[ours], other.columns(protocol.name)[theirs]
        result[protocol.name] = {
            key: paired_bootstrap(
                left[:, place], right[:, place], clusters=clusters, draws=draws, seed=seed
            )
            for place, key in enumerate(SCORE_KEYS)
        }
        result[protocol.name]["pairs"] = len(pairs)
        result[protocol.name]["closed"]["mcnemar"] = mcnemar(left[:, 0], right[:, 0])
    return result


def per_log_parameters(value: float, trainable_parameters: float) -> float:
    """Return a score divided by log10 of the trainable parameters in millions.

    89.38 with 187 million gives 39.34, as in the paper's table.

    Raises:
        CloverError: no more than one million parameters, where the figure means nothing.

    Source: METRICS, section 0 (paper's "/ log(pt)").
    """
    if not 1e6 < trainable_parameters < math.inf:
        raise CloverError(
            f"{trainable_parameters:,.0f} trainable parameters: score / log10(millions) needs "
            "more than 1,000,000"
        )
    return value / math.log10(trainable_parameters / 1e6)
