"""Whether a text states, denies or leaves open what it names.

In: a text and the place of some words in it. Out: their `Standing`. Nothing here knows grammar:
words of negation and doubt (`dictionary/negation.yaml`) reach as far as a list and a clause
usually do, and where their reach is doubtful, so is the standing.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

from clover.instruct.lists import load_yaml

Standing = Literal["stated", "denied", "open"]
"""Open is what a text calls possible, and what a negation may or may not reach."""

_END = re.compile(r"[;:!\n]|(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)\.(?= |$)|(?<=\w)\?(?= |$)")
_PARENTHESIS = re.compile(r"\([^()]*\)")
_COMMA = re.compile(r",| [-–—] ")
_OR = re.compile(r"\b(?:and/)?(?:or|nor)\b", re.IGNORECASE)
_AND = re.compile(r"(?:\band\b(?!/or)|&)", re.IGNORECASE)
# "not stained with Giemsa" denies Giemsa; "no granuloma with necrosis" may leave the necrosis.
_PARTICIPLE = re.compile(r" (?:\w+ly )?\w+(?:ed|en|nt) (?:with|by|for)\b", re.IGNORECASE)


@dataclass(frozen=True)
class _Cue:
    """Words of negation or doubt: `kind` is the name of their list."""

    kind: str
    start: int
    end: int
    text: str


def standing(text: str, start: int, end: int) -> Standing:
    """Return how a text stands to its words at `start:end`."""
    flat = _flat(text)
    found = {_from_before(flat, start, end), _from_after(flat, start, end)}
    for verdict in ("open", "denied", "loose"):
        if verdict in found:
            return "denied" if verdict == "denied" else "open"
    return "stated"


def is_denied(text: str, start: int, end: int) -> bool:
    """Say whether a text denies its words at `start:end`."""
    return standing(text, start, end) == "denied"


@functools.lru_cache(maxsize=256)
def _flat(text: str) -> str:
    """Return a text of the same length whose white space is spaces; a line's end stays."""
    return re.sub(r"[^\S\n]", " ", text)


@functools.cache
def _words(name: str) -> re.Pattern[str]:
    body = "|".join(load_yaml("dictionary/negation")[name])
    return re.compile(rf"(?<![\w-])(?:{body})(?!\w)", re.IGNORECASE)


@functools.cache
def _cue_pattern(side: str) -> re.Pattern[str]:
    """Return one regex of all cues of a side, a named group for each kind."""
    lists = load_yaml("dictionary/negation")

    def whole(cue: str) -> str:
        for name, part in lists["parts"].items():
            cue = cue.replace(f"{{{name}}}", part)
        # What begins with a sign may stand close to a word: "necrosis-free".
        return rf"(?<![\w-])(?:{cue})(?!\w)" if cue[0].isalnum() or cue[:3] == "(?:" else cue

    groups = (f"(?P<{kind}>{'|'.join(map(whole, cues))})" for kind, cues in lists[side].items())
    return re.compile("|".join(groups), re.IGNORECASE)


@functools.lru_cache(maxsize=256)
def _cues(flat: str, side: str) -> tuple[_Cue, ...]:
    return tuple(
        _Cue(str(match.lastgroup), match.start(), match.end(), match.group())
        for match in _cue_pattern(side).finditer(flat)
        if match.lastgroup != "idle"
    )


# -- from words before -------------------------------------------------------------------------


def _from_before(flat: str, start: int, end: int) -> str:
    """Return "stated", "denied", "open", or "loose": as far as the words before it tell."""
    cues = [cue for cue in _cues(flat, "before") if cue.end <= start]
    if not cues:
        return "stated"
    cue = cues[-1]
    verdict = _reach_forward(cue, flat[cue.end : start], flat[end:])
    if verdict == "denied" and len(cues) > 1:
        # "possible absence of necrosis"
        earlier = cues[-2]
        gap = flat[earlier.end : cue.start]
        if earlier.kind == "open" and not (_is_over(gap) or _COMMA.search(gap)):
            return "open"
    return verdict


def _is_over(gap: str) -> bool:
    """Say whether a clause ends within a gap between a cue and what it might speak of."""
    return bool(_END.search(gap) or _words("ends").search(gap))


def _reach_forward(cue: _Cue, gap: str, rest: str) -> str:
    if gap.startswith(":"):  # "Negative for: necrosis"
        gap = gap[1:]
    gap = _PARENTHESIS.sub("", gap)
    if re.search(r"(?:not|never|n['’]t)$", cue.text, re.IGNORECASE):
        gap = _PARTICIPLE.sub("", gap, count=1)
    if _is_over(gap) or ")" in gap:
        return "stated"
    said = f"{cue.text}{gap}" if cue.kind == "spent" else gap
    verb = _words("verbs").search(said)
    comma, joined = _COMMA.search(gap), _AND.search(gap)
    if verb and (_COMMA.search(said, verb.end()) or _AND.search(said, verb.end())):
        return "stated"
    if re.search(r", (?:with|and with|in|on)\b", gap):
        return "stated"
    if cue.kind != "denied":
        return "loose" if cue.kind == "spent" else "open"
    if _words("loose").search(gap) or joined:
        return "loose"
    if comma and not _OR.search(gap) and not _goes_on_with_or(rest):
        return "loose"
    after = _END.split(rest)[0]
    return "loose" if _words("exceptions").search(after) else "denied"


def _goes_on_with_or(rest: str) -> bool:
    """Say whether a list goes on to its "or": necrosis in "no necrosis, mitoses or atypia"."""
    found = _OR.search(rest)
    if found is None:
        return False
    gap = rest[: found.start()]
    stops = (_words("verbs"), _words("loose"), _AND)
    return not _is_over(gap) and not any(stop.search(gap) for stop in stops)


# -- from words after --------------------------------------------------------------------------


def _from_after(flat: str, start: int, end: int) -> str:
    cue = next((cue for cue in _cues(flat, "after") if cue.start >= end), None)
    if cue is None:
        return "stated"
    return _reach_backward(cue, flat[end : cue.start], _END.split(flat[:start])[-1])


def _reach_backward(cue: _Cue, gap: str, before: str) -> str:
    gap = gap[1:] if gap in (":", ": ") else _PARENTHESIS.sub("", gap)
    if not gap.strip(" ,(–—-"):  # "necrosis: absent", "mitoses (none)"
        return cue.kind
    if cue.text.lower() in {"no", "none", "zero", "0", "-free", "-like"}:
        return "stated"  # these speak of what stands beside them alone
    if _is_over(gap) or _words("verbs").search(gap) or _cues(gap, "before"):
        return "stated"
    comma = _COMMA.search(gap)
    if comma and re.match(r",? (?:and|or)\b", gap[comma.start() :]):
        # The end of a list, or a clause of its own: "large nucleoli, and follicles are absent".
        own = before[max((m.end() for m in _words("verbs").finditer(before)), default=0) :]
        if not _COMMA.search(own) and len(_COMMA.findall(gap)) == 1:
            return "stated"
    elif comma and not (_OR.search(gap, comma.end()) or _AND.search(gap, comma.end())):
        return "stated" if cue.text == "?" else "loose"
    if ")" in gap or re.search(r"\b(?:with|which|that|where|who|of the)\b", gap):
        return "loose"
    if re.search(r"\b(?:in|within|among|around|near|on|at|with|of the)(?: \w+)? $", before):
        return "loose"  # "in granulomas, mitoses are not seen"
    return cue.kind
