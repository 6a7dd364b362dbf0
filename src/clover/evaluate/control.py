"""What the controls show: how much of a score is owed to the image, and what the answers hang on.

In: prediction lines of the same questions, with the image and in other views. Out: gains with
intervals, shares of answers that stay, and a sentence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clover.evaluate.interval import bootstrap_means, cluster_codes, interval, paired_bootstrap
from clover.evaluate.item import ItemReader
from clover.evaluate.protocol.strict import rate, strict_form

Row = dict[str, Any]
Rated = dict[str, tuple[bool, float, str]]
"""id -> (is closed, closed hit or open recall as a fraction, the image it hangs on)."""
_OTHER_IMAGES = {"shuffled": "another image", "noise": "noise"}
"""Controls that show an image which is not the record's."""


def ratings(rows: Sequence[Row]) -> Rated:
    """Rate predictions by the strict rule."""
    rated = {}
    for item in ItemReader().items(rows):
        rating = rate(item)
        value = rating.closed if item.is_closed else rating.recall
        rated[str(item.id)] = (item.is_closed, float(value or 0.0), item.image or str(item.id))
    return rated


def _gain(seen: Rated, unseen: Rated, ids: Sequence[str], draws: int) -> dict[str, Any]:
    return paired_bootstrap(
        [seen[name][1] for name in ids],
        [unseen[name][1] for name in ids],
        clusters=[seen[name][2] for name in ids],
        draws=draws,
    )


def image_gain(
    with_image: Sequence[Row], without: Sequence[Row], *, draws: int = 1000
) -> dict[str, dict[str, Any]]:
    """Return by how many points the image helps, over the questions both were asked.

    Returns:
        closed and open: difference, low, high (95 %, clustered by image), p_value, n.
    """
    seen, unseen = ratings(with_image), ratings(without)
    gains = {}
    for kind, is_closed in (("closed", True), ("open", False)):
        ids = [name for name in unseen if name in seen and seen[name][0] == is_closed]
        gains[kind] = _gain(seen, unseen, ids, draws)
    return gains


def form_name(row: Row) -> str:
    """Return what groups a question with those of its kind, and whether it is closed."""
    kind = "closed" if row.get("answer_type") == "closed" else "open"
    return f"{row.get('form') or row['question']} ({kind})"


def form_gains(
    with_image: Sequence[Row], without: Sequence[Row], *, draws: int = 1000
) -> dict[str, dict[str, Any]]:
    """Return the image gain of each question form: value, low, high (points), n."""
    seen, unseen = ratings(with_image), ratings(without)
    by_form: dict[str, list[str]] = defaultdict(list)
    for row in with_image:
        if str(row["id"]) in unseen and str(row["id"]) in seen:
            by_form[form_name(row)].append(str(row["id"]))
    return {
        name: gain_row(_gain(seen, unseen, ids, draws)) for name, ids in sorted(by_form.items())
    }


def gain_row(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a paired difference as value, low, high, n."""
    named = {"value": "difference", "low": "low", "high": "high", "n": "n"}
    return {ours: found[theirs] for ours, theirs in named.items()}


def agreement(rows: Sequence[Row], others: Sequence[Row], *, draws: int = 1000) -> dict[str, Any]:
    """Return the share of answers that are the same in both, in percent: value, low, high, n.

    Equal is by the strict normal form; the interval draws whole images.
    """
    said = {str(row["id"]): strict_form(str(row["prediction"])) for row in rows}
    pairs = [row for row in others if str(row["id"]) in said]
    same = np.array(
        [[strict_form(str(row["prediction"])) == said[str(row["id"])]] for row in pairs], float
    )
    if not len(same):
        return {"value": None, "low": None, "high": None, "n": 0}
    codes = cluster_codes([str(row.get("image") or row["id"]) for row in pairs])
    low, high = interval(bootstrap_means(same, codes, draws=draws)[:, 0]) if draws else (None, None)
    return {
        "value": 100 * float(same.mean()),
        "low": None if low is None else round(100 * low, 4),
        "high": None if high is None else round(100 * high, 4),
        "n": len(same),
    }


def form_table(
    rows: Mapping[str, Sequence[Row]], others: Mapping[str, Sequence[Row]], *, draws: int = 0
) -> dict[str, Any]:
    """Return accuracy (closed) or recall (open) in percent: question form by view or baseline.

    With the blind view also `gain`: what the image is worth to the form, with its interval.
    """
    forms = {str(row["id"]): form_name(row) for row in rows["image"]}
    table: dict[str, dict[str, Any]] = {}
    for view, found in {**rows, **others}.items():
        values = defaultdict(list)
        for name, (is_closed, value, _) in ratings(found).items():
            values[forms[name], is_closed].append(value)
        for (form, is_closed), numbers in sorted(values.items()):
            entry = table.setdefault(form, {"type": "closed" if is_closed else "open"})
            if view == "image":
                entry["n"] = len(numbers)
            entry[view] = round(100 * float(np.mean(numbers)), 2)
    for name, share in _majority(rows["image"]).items():
        if name in table:
            table[name]["majority"] = share
    if "blind" in rows:
        for name, gain in form_gains(rows["image"], rows["blind"], draws=draws).items():
            if name in table:
                table[name]["gain"] = gain
    return table


def _majority(rows: Sequence[Row]) -> dict[str, float]:
    """Return the share of the commonest answer of each form, in percent."""
    answers = defaultdict(list)
    for row in rows:
        answers[form_name(row)].append(str(row["answer"]).lower())
    return {
        key: round(100 * max(map(found.count, set(found))) / len(found), 2)
        for key, found in answers.items()
    }


def verdict(gains: Mapping[str, Mapping[str, Any]]) -> str:
    """Say in a sentence whether the model looks at the image.

    It does where the score falls without the image and, where these were asked, with another image
    and with noise: a model whose answers come with any image at all needs one, and reads none. A
    fall is one whose paired interval lies above 0, whatever its size: of few distinct answers
    another image's is often right too.

    Args:
        gains: `image_gain` by view; `blind`, `shuffled` and `noise` are considered.
    """
    if "blind" not in gains:
        return "Not known whether the model looks: run again with --controls."
    kinds = [kind for kind in ("closed", "open") if gains["blind"][kind]["n"]]
    needs = [_is_proven(gains["blind"][kind]) for kind in kinds]
    denied = {kind: _without_fall(gains, kind) for kind in kinds}
    said = [_kind_sentence(gains, kind, denied[kind]) for kind in kinds]
    shuffled = gains.get("shuffled")
    is_told = "shuffled" in denied.get("closed", ()) and _is_proven(gains["blind"]["closed"])
    if shuffled is not None and shuffled["closed"]["n"] and not is_told:
        said.append(
            f"with another image it loses {shuffled['closed']['difference']:.1f} points (closed)"
        )
    looks = [need and not denied[kind] for kind, need in zip(kinds, needs, strict=True)]
    return f"{_head(needs, looks)}: {'; '.join(said)}."


def _head(needs: Sequence[bool], looks: Sequence[bool]) -> str:
    """Return how the sentence begins; of each kind of question: needs an image, and looks at it."""
    if any(looks):
        return "The model looks" if all(looks) else "The model looks only in part"
    return (
        "The model needs an image but does not read it" if any(needs) else "The model does not look"
    )


def _is_proven(gain: Mapping[str, Any]) -> bool:
    return gain["low"] is not None and gain["low"] > 0


def _without_fall(gains: Mapping[str, Mapping[str, Any]], kind: str) -> list[str]:
    """Return the controls with an image that is not the record's in which no fall is proven."""
    return [
        view
        for view in _OTHER_IMAGES
        if view in gains and gains[view][kind]["n"] and not _is_proven(gains[view][kind])
    ]


def _kind_sentence(gains: Mapping[str, Mapping[str, Any]], kind: str, denied: Sequence[str]) -> str:
    """Say what the image is worth to closed or open questions, and what speaks against it."""
    gain = gains["blind"][kind]
    worth = "is worth" if _is_proven(gain) else "shows no proven gain:"
    said = f"on {kind} questions the image {worth} {_points(gain)}"
    if not _is_proven(gain) or not denied:
        return said
    against = " and ".join(
        f"with {_OTHER_IMAGES[view]} ({_points(gains[view][kind])}, n={gains[view][kind]['n']:,})"
        for view in denied
    )
    return f"{said}, but the score shows no proven fall {against}"


def _points(gain: Mapping[str, Any]) -> str:
    low, high = gain["low"], gain["high"]
    bounds = "" if low is None else f" [{low:.1f}, {high:.1f}]"
    return f"{gain['difference']:.1f}{bounds} points"
