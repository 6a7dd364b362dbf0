"""The published scoring rules, written from METRICS sections 1 to 2.3 to be read, not to be fast.

One item at a time, one character or word at a time, sentence by sentence of the text. It shares
nothing with the fast code; only its table of contractions is the same data, read another way.
"""

from __future__ import annotations

import math
import string
import unicodedata
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import yaml

Score = float | None
MARKS = [*';/["', *"]{}()=+\\_-><@`,?!"]
SMALLEST = 2.2250738585072014e-308


def contractions() -> dict[str, str]:
    text = files("clover.evaluate.protocol").joinpath("contractions.yaml").read_text("utf-8")
    data = yaml.safe_load(text)
    table = dict(data["reversed"])
    for form in data["forms"].split():
        pieces = form.split("'")
        for place in range(1, len(pieces)):
            left, right = "'".join(pieces[:place]), "'".join(pieces[place:])
            table[left + right] = form
    return table


NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
NUMBERS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTIONS = contractions()


def is_digit(text: str, place: int) -> bool:
    return 0 <= place < len(text) and text[place].isdecimal()


def normalise(text: str) -> str:
    """1.1: punctuation, the first 32 full stops, numbers, articles, contractions, commas."""
    has_number_comma = any(
        text[at] == "," and is_digit(text, at - 1) and is_digit(text, at + 1)
        for at in range(len(text))
    )
    out = text
    for mark in MARKS:
        if mark + " " in text or " " + mark in text or has_number_comma:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    kept, removed = "", 0
    for at, character in enumerate(out):
        if character == "." and not is_digit(out, at + 1) and removed < 32:
            removed += 1
            continue
        kept += character
    words = []
    for word in kept.split():
        word = NUMBERS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words).replace(",", "")


def count(words: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return counts


def token_scores(prediction: list[str], gold: list[str]) -> tuple[float, float, float, float]:
    """1.3 and 1.4: recall, precision, F1 and what is called exact match."""
    said, truth = count(prediction), count(gold)
    true = sum(said[word] for word in said if word in truth)
    false = sum(said[word] for word in said if word not in truth)
    missed = sum(truth[word] for word in truth if word not in said)
    found = sum(1 for word in truth if word in said)
    exact = found / len(prediction) if prediction else 0.0
    if not prediction or not gold or true == 0:
        return 0.0, 0.0, 0.0, exact
    precision, recall = true / (true + false), true / (true + missed)
    return recall, precision, 2 * precision * recall / (precision + recall), exact


def llava_med_words(text: str) -> list[str]:
    """The caller normalises, each metric again; then lower, strip, split."""
    return normalise(normalise(text.lower())).lower().strip().split()


def ngrams(words: list[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + order]) for at in range(len(words) - order + 1)]


def clipped(prediction: list[str], gold: list[str], order: int) -> tuple[int, int]:
    left = ngrams(gold, order)
    said = ngrams(prediction, order)
    hits = 0
    for gram in said:
        if gram in left:
            left.remove(gram)
            hits += 1
    return hits, len(said)


def bleu(prediction: str, answer: str, weights: list[float]) -> float:
    """1.6: nltk's sentence_bleu without smoothing."""
    said, gold = normalise(prediction.lower()).split(), normalise(answer.lower()).split()
    found = [clipped(said, gold, order) for order in range(1, len(weights) + 1)]
    if found[0][0] == 0:
        return 0.0
    penalty = 1.0 if len(said) > len(gold) else math.exp(1 - len(gold) / len(said))
    total = 0.0
    for weight, (hits, among) in zip(weights, found, strict=True):
        precision = hits / max(1, among)
        total += weight * math.log(precision if precision else SMALLEST)
    return penalty * math.exp(total)


def closed(item: dict[str, Any], rule: str) -> Any:
    """2.1 and 2.2: 1, 0, "dropped", or None where there is no such rule or no such truth."""
    said = normalise(item["prediction"].lower())
    gold = normalise(item["answer"].lower())
    either = "yes" in said or "no" in said
    if rule == "llava-med":
        return 1.0 if either and gold in said else 0.0
    if rule == "llava-med-batch":
        return 1.0 if gold in said else 0.0
    if rule == "llava-med-pvqa":
        if either:
            return 1.0 if gold in said else "dropped"
        return 0.0
    if rule == "quilt":
        words = said.replace(",", "").split(" ")
        label = "no" if "no" in words or "not" in words else "yes"
        truth = item["yes_no_answer"].lower() if item.get("yes_no_answer") else gold
        return None if truth not in ("yes", "no") else float(label == truth)
    return None


def letters(text: str) -> list[str]:
    kept = "".join(
        character
        for character in text
        if "a" <= character <= "z" or "A" <= character <= "Z" or character == " "
    )
    return kept.lower().split()


def squad_words(text: str) -> list[str]:
    """Strict: lower-case, no punctuation (of any script), no articles unless nothing else is left.

    A word with accents is composed first, so that both spellings are one.
    """
    words = []
    for raw in text.split():
        word = unicodedata.normalize("NFC", raw.lower())
        kept = ""
        for character in word:
            if character in string.punctuation or unicodedata.category(character).startswith("P"):
                continue
            kept += character
        if kept:
            words.append(kept)
    others = [word for word in words if word not in ("a", "an", "the")]
    return others or words


def first_yes_no(text: str) -> str | None:
    """Strict: the first run of letters and digits that is yes or no."""
    run = ""
    for character in [*text.lower(), " "]:
        if character.isalnum():
            run += character
            continue
        if run in ("yes", "no"):
            return run
        run = ""
    return None


def strict(item: dict[str, Any]) -> dict[str, Score]:
    if item["answer_type"] == "closed":
        gold = first_yes_no(item.get("yes_no_answer") or item["answer"])
        said = first_yes_no(item["prediction"])
        return row(closed=None if gold is None else float(said == gold))
    said_words, gold_words = squad_words(item["prediction"]), squad_words(item["answer"])
    left, common = list(gold_words), 0
    for word in said_words:
        if word in left:
            left.remove(word)
            common += 1
    if common == 0:
        return row(recall=0.0, precision=0.0, f1=0.0, exact=0.0)
    precision, recall = common / len(said_words), common / len(gold_words)
    f1 = 2 * precision * recall / (precision + recall)
    return row(recall=recall, precision=precision, f1=f1, exact=float(said_words == gold_words))


def row(**found: Any) -> dict[str, Any]:
    return {key: found.get(key) for key in ("closed", "recall", "precision", "f1", "exact")}


def llava_med(item: dict[str, Any], rule: str) -> dict[str, Any]:
    said, gold = llava_med_words(item["prediction"]), llava_med_words(item["answer"])
    recall, precision, f1, exact = token_scores(said, gold)
    if item["answer_type"] == "closed":
        found = row(closed=closed(item, rule))
        if rule == "llava-med-batch":
            found.update(recall=recall, precision=precision, f1=f1)
        return found
    found = row(recall=recall, precision=precision, f1=f1, exact=exact)
    found["bleu"] = bleu(item["prediction"], item["answer"], [0.25] * 4)
    found["bleu_1"] = bleu(item["prediction"], item["answer"], [1, 0, 0, 0])
    found["bleu_2"] = bleu(item["prediction"], item["answer"], [0, 1, 0, 0])
    found["bleu_3"] = bleu(item["prediction"], item["answer"], [0, 0, 1, 0])
    return found


def pathvqa_official(item: dict[str, Any]) -> dict[str, Any]:
    """2.3: no closed rule; F1 and "exact match" over letters alone."""
    _, _, f1, exact = token_scores(letters(item["prediction"]), letters(item["answer"]))
    return row(f1=f1, exact=exact)


def judge(item: dict[str, Any], protocol: str) -> dict[str, Any]:
    """Rate one item: what `clover score --per-item` writes under a protocol, but for its BLEU."""
    rules: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "strict": strict,
        "pathvqa-official": pathvqa_official,
    }
    return rules[protocol](item) if protocol in rules else llava_med(item, protocol)
