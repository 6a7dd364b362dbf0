"""Does the caption bear out the answer? Terms, words, negations, opposites, numbers.

In: a question, an answer and the caption they were made from. Out: the reason why the caption does
not support them, or None. Nothing here understands language; it compares what two texts state, and
was measured on a labelled set (see docs/instruct.md).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

from clover.instruct.caption import lone_measures
from clover.instruct.lists import load_yaml, words
from clover.instruct.standing import Standing, is_denied, standing
from clover.instruct.vocabulary import DICTIONARIES, content_stems, dictionary, stem

MIN_OVERLAP = 0.6
"""Share of an answer's telling words that must stand in the caption."""
_SENTENCE_SHARE = 0.57
"""Of that share, what each sentence needs: a long answer must not carry one that is made up."""
_WORDS_WITHOUT_NOISE = 80
"""In longer captions ordinary words stand in so many clauses that their negation says nothing."""

_SENTENCE = re.compile(r"(?<=[.!?;])\s+")
_SIDE = re.compile(r"dimension|diameter|length|long|wid|across|side|large|great|up to", re.I)
_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)?(?!\w)|\b(?:I{1,3}|IV|VI{0,3})\b")
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ROMAN = {"I": "1", "II": "2", "III": "3", "IV": "4", "V": "5", "VI": "6", "VII": "7", "VIII": "8"}


@dataclass(frozen=True)
class Statement:
    """What a text states, in a form that can be compared."""

    text: str
    stems: frozenset[str]
    affirmed: frozenset[tuple[str, str]]
    """(dictionary, term) pairs."""
    denied: frozenset[tuple[str, str]]
    open: frozenset[tuple[str, str]]
    """What the text calls possible, and what a negation may or may not reach."""
    numbers: frozenset[str]
    implied: str = ""
    """Words that follow from the text: of a fibroadenoma, "benign"."""


def read_statement(text: str) -> Statement:
    """Read what a text states."""
    found: dict[Standing, set[tuple[str, str]]] = {"stated": set(), "denied": set(), "open": set()}
    for name in DICTIONARIES:
        for how, terms in dictionary(name).standings(text).items():
            found[how] |= {(name, term) for term in terms}
    return Statement(
        text,
        frozenset(_stems(text)),
        frozenset(found["stated"]),
        frozenset(found["denied"]),
        frozenset(found["open"]),
        _numbers(text),
    )


def _read_question(question: str) -> Statement:
    """Read what a question asks for; that it asks leaves nothing open."""
    asked = read_statement(question.replace("?", "."))
    return dataclasses.replace(asked, affirmed=asked.affirmed | asked.open, open=frozenset())


@functools.lru_cache(maxsize=4096)
def read_caption(caption: str) -> Statement:
    """Read a caption, with what its words imply: a carcinoma is a tumour."""
    statement = read_statement(caption)
    stems = set(statement.stems)
    implied: list[str] = []
    for causes, effects in _implied():
        if causes & statement.stems:
            stems |= {stem(word) for word in effects}
            implied += effects
    named = statement.affirmed | statement.denied | statement.open
    terms = {stem for _, term in named for stem in _stems(term)}
    return dataclasses.replace(statement, stems=frozenset(stems | terms), implied=" ".join(implied))


def _stems(text: str) -> list[str]:
    return content_stems(text)


@functools.cache
def _implied() -> list[tuple[frozenset[str], list[str]]]:
    pairs = load_yaml("dictionary/language")["implied"]
    return [(frozenset(map(stem, causes)), effects) for causes, effects in pairs]


@functools.cache
def _opposites() -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
    def compiled(variants: list[str]) -> re.Pattern[str]:
        body = "|".join(re.escape(word) for word in sorted(variants, key=len, reverse=True))
        return re.compile(rf"(?<![\w-])(?:{body})(?![\w-])", re.IGNORECASE)

    pairs = load_yaml("dictionary/language")["opposites"]
    return [(compiled(first), compiled(second)) for first, second in pairs]


def _numbers(text: str) -> frozenset[str]:
    found = {_ROMAN.get(number, number) for number in _NUMBER.findall(text)}
    for value, word in enumerate(_NUMBER_WORDS):
        if re.search(rf"\b{word}\b", text, re.IGNORECASE):
            found.add(str(value))
    return frozenset(found)


def fault(
    question: str,
    answer: str,
    caption: str,
    *,
    support: str | None = None,
    min_overlap: float = MIN_OVERLAP,
) -> str | None:
    """Return why a caption does not support a pair, or None.

    Args:
        question: The question.
        answer: The answer.
        caption: The caption that the pair was made from.
        support: The words of the caption that the model gave as the answer's ground.
        min_overlap: Share of the answer's telling words that must stand in the caption.
    """
    source = read_caption(caption)
    if support and not _holds(caption, support):
        return "span: the words given as support are not in the caption"
    polarity = _polarity(answer)
    asked = _read_question(question)
    rest = re.sub(r"^\s*(yes|no)\b[\s,.:;–-]*", "", answer, flags=re.IGNORECASE)
    if polarity is not None:
        reason = _closed_fault(asked, polarity, source)
        if reason is not None:
            return reason
        if not rest.strip():
            return None
    else:
        reason = _terms_fault(asked, source, "question")
        if reason is not None:
            return reason
    return _answer_fault(read_statement(rest), source, asked, min_overlap)


def _answer_fault(
    answer: Statement, source: Statement, asked: Statement, min_overlap: float
) -> str | None:
    checks: tuple[Callable[[], str | None], ...] = (
        lambda: _negation_fault(answer, source),
        lambda: _normality_fault(answer, source),
        lambda: _terms_fault(answer, source, "answer"),
        lambda: _number_fault(answer, source),
        lambda: _opposite_fault(answer, source),
        lambda: _overlap_fault(answer, source, min_overlap),
        lambda: _question_fault(asked, source),
    )
    return next((reason for check in checks if (reason := check()) is not None), None)


def _holds(caption: str, support: str) -> bool:
    def flat(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    return flat(support) in flat(caption)


def _polarity(answer: str) -> bool | None:
    match = re.match(r"\s*(yes|no)\b(?!\s+\w+\s+(?:is|are)\b)", answer, re.IGNORECASE)
    return None if match is None else match.group(1).lower() == "yes"


# -- closed questions ---------------------------------------------------------------------


def _closed_fault(asked: Statement, is_yes: bool, source: Statement) -> str | None:
    """Check a yes or no: yes needs it stated, no needs it denied or excluded."""
    terms = asked.affirmed | asked.denied
    if asked.denied and not asked.affirmed:
        is_yes = not is_yes  # "Is there no necrosis?"
    against = _speaks_against(asked, source)
    left_open = _left_open(asked, source)
    if left_open and not against:
        return f"unsupported: the caption leaves {left_open} open"
    if is_yes:
        if against:
            return f"contradiction: yes, though the caption {against}"
        missing = [term for term in terms if not _states(source, term)]
        if missing:
            return f"unsupported: yes to {missing[0][1]}, which the caption does not state"
        telling = asked.stems
        if telling and not terms and len(telling & source.stems) < MIN_OVERLAP * len(telling):
            return "unsupported: yes to what the caption does not state"
        return None
    if against:
        return None
    if terms and all(_states(source, term) for term in terms):
        return "contradiction: no to what the caption states"
    return "unsupported: no, though the caption does not exclude it"


def _speaks_against(asked: Statement, source: Statement) -> str | None:
    """Return how the caption excludes what is asked, or None."""
    denied = asked.affirmed & source.denied
    if denied:
        return f"denies {min(denied)[1]}"
    for name in ("body_parts", "stains"):
        wanted = {term for kind, term in asked.affirmed if kind == name}
        given = {term for kind, term in source.affirmed if kind == name}
        if wanted and given and not any(_states(source, (name, term)) for term in wanted):
            return f"states {min(given)}"
    for side, other in _sides():
        if (
            side.search(asked.text)
            and (_affirms(other, source.text) or other.search(source.implied))
            and not side.search(source.text)
        ):
            return "states the opposite"
    if _is_normal(source.text) and words("abnormal").search(asked.text):
        return "calls it normal"
    if _asks_normal(asked.text) and _affirms(words("abnormal"), source.text):
        return "states a lesion"
    return _denied_words(asked, source)


def _denied_words(asked: Statement, source: Statement) -> str | None:
    """Return a note when the caption negates words that no dictionary knows."""
    for word in re.finditer(r"[^\W\d_]{4,}", source.text):
        found = stem(word.group())
        if found in asked.stems and _denied_everywhere(found, source.text):
            return f"denies {word.group().lower()}"
    return None


def _left_open(asked: Statement, source: Statement) -> str | None:
    """Return what is asked that the caption neither states nor denies, though it names it."""
    terms = (asked.affirmed | asked.denied) & source.open
    if terms:
        return min(terms)[1]
    if asked.affirmed or asked.denied:
        return None
    for word in re.finditer(r"[^\W\d_]{4,}", source.text):
        found = stem(word.group())
        if found in asked.stems and _standings(found, source.text) == {"open"}:
            return word.group().lower()
    return None


def _sides() -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
    return [pair for first, second in _opposites() for pair in ((first, second), (second, first))]


def _affirms(pattern: re.Pattern[str], text: str) -> bool:
    return any(standing(text, *match.span()) == "stated" for match in pattern.finditer(text))


def _is_normal(text: str) -> bool:
    return _affirms(words("normal"), text) and not _affirms(words("abnormal"), text)


def _asks_normal(text: str) -> bool:
    return bool(words("normal").search(text)) and not words("abnormal").search(text)


# -- open answers -------------------------------------------------------------------------


def _states(source: Statement, term: tuple[str, str]) -> bool:
    """Say whether a caption names a term, by itself or within a longer one."""
    if term in source.affirmed | source.denied | source.open:
        return True
    stems = _stems(term[1])
    return bool(stems) and all(found in source.stems for found in stems)


def _terms_fault(statement: Statement, source: Statement, where: str) -> str | None:
    terms = statement.affirmed | (statement.denied if where == "answer" else frozenset())
    for term in sorted(terms):
        if not _states(source, term):
            return f"unsupported: the {where} names {term[1]}, which the caption does not"
    return None


def _negation_fault(answer: Statement, source: Statement) -> str | None:
    for term in sorted(answer.affirmed & source.denied):
        return f"contradiction: the caption denies {term[1]}"
    for term in sorted((answer.affirmed | answer.denied) & source.open):
        return f"unsupported: the caption leaves {term[1]} open"
    for term in sorted(answer.denied & source.affirmed):
        return f"contradiction: the caption states {term[1]}, the answer denies it"
    if len(source.text.split()) > _WORDS_WITHOUT_NOISE:
        return None
    # Words that no dictionary knows: "goblet cells are not reduced".
    for word in re.finditer(r"[^\W\d_]{5,}", source.text):
        found = stem(word.group())
        if found not in answer.stems:
            continue
        here = is_denied(source.text, *word.span())
        there = _denied_everywhere(found, answer.text)
        if there is not None and here != there and _denied_everywhere(found, source.text) == here:
            return f"contradiction: '{word.group().lower()}' is denied on one side only"
    return None


def _denied_everywhere(found: str, text: str) -> bool | None:
    """Say whether a word is denied wherever it stands; None when mixed or absent."""
    states = {name == "denied" for name in _standings(found, text)}
    return states.pop() if len(states) == 1 else None


def _standings(found: str, text: str) -> set[Standing]:
    """Return how a text stands to a stem, wherever it holds it."""
    return {
        standing(text, *word.span())
        for word in re.finditer(r"[^\W\d_]{4,}", text)
        if stem(word.group()) == found
    }


def _normality_fault(answer: Statement, source: Statement) -> str | None:
    if _is_normal(source.text) and _affirms(words("abnormal"), answer.text):
        return "contradiction: the caption calls it normal"
    lesion = _affirms(words("abnormal"), source.text) and not words("normal").search(source.text)
    if lesion and _is_normal(answer.text):
        return "contradiction: the answer calls normal what the caption does not"
    return None


def _number_fault(answer: Statement, source: Statement) -> str | None:
    # "One" and "two" are how people count what a caption lists.
    wrong = answer.numbers - source.numbers - {"0", "1", "2"}
    if wrong:
        return f"number: {min(wrong)} is not in the caption"
    # Of "4 x 5 x 6 cm" no one may make "6 cm", save as one of its sides.
    alone = lone_measures(answer.text) - lone_measures(source.text)
    if alone and not _SIDE.search(answer.text):
        return f"number: {min(alone)} is not in the caption by itself"
    return None


def _opposite_fault(answer: Statement, source: Statement) -> str | None:
    for side, other in _sides():
        match = side.search(answer.text)
        if (
            match
            and not is_denied(answer.text, *match.span())
            and not other.search(answer.text)
            and not side.search(source.text)
            and _affirms(other, source.text)
        ):
            return f"contradiction: '{match.group().lower()}', the opposite of the caption"
    return None


def _overlap_fault(answer: Statement, source: Statement, min_overlap: float) -> str | None:
    if not answer.stems:
        return "unsupported: the answer says nothing of the tissue"
    share = len(answer.stems & source.stems) / len(answer.stems)
    if share < min_overlap:
        return f"unsupported: {share:.0%} of the answer's words are in the caption"
    for sentence in _SENTENCE.split(answer.text):
        stems = set(_stems(sentence))
        if len(stems) >= 2 and len(stems & source.stems) < _SENTENCE_SHARE * min_overlap * len(
            stems
        ):
            return f"unsupported: nothing in the caption says '{sentence.strip()[:60]}'"
    return None


@functools.cache
def _asking_stems() -> frozenset[str]:
    """Words that ask for a description and claim nothing: those of our own templates."""
    templates = load_yaml("templates")
    return frozenset(_stems(" ".join([*templates["concise"], *templates["detailed"]])))


def _question_fault(asked: Statement, source: Statement) -> str | None:
    strange = asked.stems - source.stems - _asking_stems()
    if len(strange) >= 2 and len(strange) > 0.5 * len(asked.stems):
        return "unsupported: the question is about what the caption does not state"
    return None
