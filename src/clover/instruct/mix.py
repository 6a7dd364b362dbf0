"""The hybrid set: sources in stated proportions, yes and no balanced, no image too often.

In: named lists of instruction records. Out: one shuffled list, split by image group, so that no
image has questions on both sides.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from clover.core.errors import CloverError, nearest
from clover.core.record import Record
from clover.instruct.costs import total_usd
from clover.instruct.vocabulary import dictionary

UNKNOWN = "unknown"


@dataclass(frozen=True)
class MixSettings:
    """How a hybrid set is put together."""

    per_image: int | None = None
    """Most questions about one image."""
    per_body_part: float | None = None
    """Largest share of one body part, unknown excepted."""
    validation_share: float = 0.0
    """Share of image groups that become the split "val"."""
    balance: bool = True
    """Whether closed questions are thinned until yes and no are equally many."""


def mix_records(
    sources: Mapping[str, list[Record]],
    *,
    shares: Mapping[str, float] | None = None,
    seed: int = 0,
    settings: MixSettings | None = None,
    names: Mapping[str, str] | None = None,
) -> list[Record]:
    """Mix sources into one set.

    Args:
        sources: Name to records.
        shares: Name to its share of the result; they are scaled to add up to 1. Without shares
            everything is taken; with them, nothing of a source that has none. No record is ever
            used twice: the scarcest source decides the size.
        seed: Decides which records are taken, their order and the split.
        settings: Caps, balance and split.
        names: Of `first_names`, where images were renamed: the split goes by what they were called.

    Returns:
        The records with `split` set where a validation share is asked for, and unique ids.

    Raises:
        CloverError: shares of unknown sources, below 0, or adding up to 0; a source that is empty
            and has a share.
    """
    settings = settings or MixSettings()
    _check_settings(settings)
    rng = random.Random(seed)
    pools = {}
    for name, records in sources.items():
        pool = list(records)
        rng.shuffle(pool)
        if settings.balance:
            pool = balance_answers(pool)
        pools[name] = cap(pool, settings.per_image) if settings.per_image else pool
    chosen = _take(pools, shares)
    if settings.per_image:  # an image may come from several sources
        chosen = cap(chosen, settings.per_image)
    if settings.per_body_part is not None:
        chosen = _cap_body_parts(chosen, settings.per_body_part)
    if settings.balance:
        # Caps may have tilted it again.
        chosen = balance_answers(chosen)
    rng.shuffle(chosen)
    return _unique_ids(_split(chosen, settings.validation_share, seed, names or {}))


def _check_settings(settings: MixSettings) -> None:
    for name, value in (
        ("--val", settings.validation_share),
        ("--per-body-part", settings.per_body_part),
    ):
        if value is not None and not 0 <= value <= 1:
            raise CloverError(f"{name} {value:g} is not between 0 and 1")
    if settings.per_image is not None and settings.per_image < 1:
        raise CloverError(f"--per-image {settings.per_image} is less than 1")


def _take(pools: Mapping[str, list[Record]], shares: Mapping[str, float] | None) -> list[Record]:
    if shares is None:
        return [record for pool in pools.values() for record in pool]
    for name, share in shares.items():
        if name not in pools:
            raise CloverError(f"a share is given for '{name}'{nearest(name, pools)}")
        if not 0 <= share < math.inf:
            raise CloverError(f"the share of '{name}' is {share:g}; it must not be below 0")
    total = sum(shares.values())
    if total <= 0:
        raise CloverError("the shares add up to 0; give at least one above 0")
    wanted = {name: share / total for name, share in shares.items() if share > 0}
    empty = [name for name in wanted if not pools[name]]
    if empty:
        raise CloverError(f"'{empty[0]}' has a share but no record")
    size = min(len(pools[name]) / share for name, share in wanted.items())
    return [
        record
        for name, share in wanted.items()
        for record in pools[name][: max(1, round(size * share))]
    ]


def _is_no(record: Record) -> bool | None:
    """Return True for no, False for yes, None for any other answer."""
    answer = (record.answer or "").strip().lower().rstrip(".!")
    return {"no": True, "yes": False}.get(answer)


def balance_answers(records: Iterable[Record]) -> list[Record]:
    """Thin the more frequent of yes and no until both are equally many; keep the order."""
    pool = list(records)
    counts = Counter(_is_no(record) for record in pool)
    room = {answer: min(counts[True], counts[False]) for answer in (True, False)}
    kept = []
    for record in pool:
        answer = _is_no(record)
        if answer is not None:
            if room[answer] == 0:
                continue
            room[answer] -= 1
        kept.append(record)
    return kept


def cap(records: Iterable[Record], most: int) -> list[Record]:
    """Keep at most so many records an image."""
    counts: Counter[str] = Counter()
    kept = []
    for record in records:
        key = record.image or record.group or record.id
        counts[key] += 1
        if counts[key] <= most:
            kept.append(record)
    return kept


def body_part(record: Record) -> str:
    """Return the body part that a record's caption, or else its pair, states first."""
    text = record.caption or f"{record.question or ''} {record.answer or ''}"
    stated = dictionary("body_parts").stated(text)
    return stated[0] if stated else UNKNOWN


def _cap_body_parts(records: list[Record], share: float) -> list[Record]:
    """Thin body parts until none but unknown holds more than `share` of what is left."""
    parts = [body_part(record) for record in records]
    counts = Counter(parts)
    capped = {part for part in counts if part != UNKNOWN}
    # The cap shrinks the whole, which tightens the cap: repeat until it holds still.
    limit = len(records)
    for _ in range(100):
        total = sum(min(n, limit) if part in capped else n for part, n in counts.items())
        tightened = max(1, int(share * total))
        if tightened >= limit:
            break
        limit = tightened
    taken: Counter[str] = Counter()
    kept = []
    for record, part in zip(records, parts, strict=True):
        taken[part] += 1
        if part not in capped or taken[part] <= limit:
            kept.append(record)
    return kept


def first_names(pairs: Iterable[tuple[Record, Record]]) -> dict[str, str]:
    """Return what groups were called before their records were renamed, by what they are now.

    Args:
        pairs: A record as it stood in its file, and as it is now. Of several names that became one
            the least counts, whatever the order.
    """
    names: dict[str, str] = {}
    for before, after in pairs:
        name, group = _group(before), _group(after)
        names[group] = min(name, names.get(group, name))
    return names


def _split(
    records: list[Record], share: float, seed: int, names: Mapping[str, str]
) -> list[Record]:
    """Mark whole groups as val by a hash of their name: more data never moves a group.

    Where one source gives an image a group and another gives it none, or another group, what hangs
    together is one group, by the least of their names. A name counts as it stood in its file
    (`names`): where the set is written to must not decide what is validated on.
    """
    if share == 0:
        return records
    joined = _joined_groups(records)
    least: dict[str, str] = {}
    for group, component in joined.items():
        name = names.get(group, group)
        least[component] = min(name, least.get(component, name))

    def split(record: Record) -> str:
        name = least[joined[_group(record)]]
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        return "val" if int.from_bytes(digest[:8], "big") < share * 2**64 else "train"

    return [record.model_copy(update={"split": split(record)}) for record in records]


def _group(record: Record) -> str:
    return record.group or record.image or record.id


def _joined_groups(records: list[Record]) -> dict[str, str]:
    """Return the name of each group's component: groups that share an image are joined."""
    parents: dict[str, str] = {}

    def find(name: str) -> str:
        parents.setdefault(name, name)
        while parents[name] != name:
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    first: dict[str, str] = {}  # the group in which an image was met first
    for record in records:
        group = find(_group(record))
        if record.image:
            other = find(first.setdefault(record.image, group))
            # The lesser name stays: a component is called by its least, whatever the order.
            parents[max(group, other)] = min(group, other)
    return {name: find(name) for name in parents}


def _unique_ids(records: list[Record]) -> list[Record]:
    """Number ids that two sources share."""
    seen: Counter[str] = Counter()
    unique = []
    for record in records:
        seen[record.id] += 1
        count = seen[record.id]
        unique.append(
            record if count == 1 else record.model_copy(update={"id": f"{record.id}~{count}"})
        )
    return unique


def data_card(
    records: list[Record],
    *,
    sources: Mapping[str, int],
    costs: list[dict[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Describe a set: counts, sources, licences, prompt versions, cost.

    Args:
        records: The mixed set.
        sources: Input name to the number of records it held.
        costs: Totals of the ledgers that the inputs go back to.
        seed: Of the mix.
    """
    by: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        by["origin"][record.origin or UNKNOWN] += 1
        by["source"][record.source or UNKNOWN] += 1
        by["licence"][record.licence or UNKNOWN] += 1
        by["prompt"][str(getattr(record, "prompt", UNKNOWN))] += 1
        by["split"][record.split or "none"] += 1
        by["answer_type"][record.answer_type or UNKNOWN] += 1
        by["body_part"][body_part(record)] += 1
        answer = _is_no(record)
        if answer is not None:
            by["yes_no"]["no" if answer else "yes"] += 1
    return {
        "records": len(records),
        "images": len({record.image for record in records if record.image}),
        "groups": len({record.group for record in records if record.group}),
        "seed": seed,
        "inputs": dict(sources),
        **{name: dict(counter.most_common()) for name, counter in by.items()},
        "usd": total_usd(costs),
        "ledgers": costs,
        "use": "research use, not for diagnosis",
    }
