"""The rules on answers small enough to score by hand."""

from __future__ import annotations

import math

import pytest

from clover.core.errors import CloverError
from clover.evaluate.protocol import DROPPED, PROTOCOLS, Item, find_protocols
from clover.evaluate.protocol.bleu import sentence_bleu
from clover.evaluate.protocol.llava_med import CandidateAnswers, metric_words, normal, token_scores
from clover.evaluate.protocol.normalise import strict_words, vqa_normalise
from clover.evaluate.protocol.strict import word_scores


def closed(prediction: str, answer: str = "no", yes_no_answer: str | None = None) -> Item:
    return Item("1", "Is it?", answer, True, prediction, yes_no_answer)


@pytest.mark.parametrize(
    ("prediction", "hit"),
    [
        ("No.", 1.0),
        ("no, it is normal; yes", 1.0),
        ("Yes, no doubt", 0.0),
        ("normal", 0.0),
        ("nodule", 0.0),
        ("", 0.0),
        ("none", 0.0),
        ("It is (no)", 1.0),
        ("yes/no", 0.0),
    ],
)
def test_strict_reads_the_first_whole_word_yes_or_no(prediction: str, hit: float) -> None:
    assert PROTOCOLS["strict"].rate(closed(prediction)).closed == hit


def test_strict_reports_what_it_cannot_parse_and_counts_it_wrong() -> None:
    rating = PROTOCOLS["strict"].rate(closed("It is normal."))
    assert (rating.closed, rating.label) == (0.0, None)


def test_strict_takes_the_truth_from_prose_or_from_yes_no_answer() -> None:
    rate = PROTOCOLS["strict"].rate
    assert rate(closed("no", "No, the gland is benign.")).closed == 1.0
    assert rate(closed("no", "The gland is benign.", "No")).closed == 1.0
    assert rate(closed("no", "The gland is benign.")).closed is None


def test_strict_open_scores_count_the_smaller_number_of_each_word() -> None:
    # said: fat fat fat cells; gold: fat fat stroma -> common 2, precision 2/4, recall 2/3.
    precision, recall, f1, exact = word_scores("Fat, fat, the fat cells.", "fat fat stroma")
    assert (precision, recall, exact) == (2 / 4, 2 / 3, 0.0)
    assert f1 == pytest.approx(4 / 7)


def test_strict_exact_match_is_equality_after_normalisation() -> None:
    assert word_scores("The Liver.", "liver") == (1.0, 1.0, 1.0, 1.0)
    assert word_scores("liver kidney", "kidney liver")[3] == 0.0
    assert word_scores("“liver”", "liver")[3] == 1.0
    assert word_scores("", "") == (0.0, 0.0, 0.0, 0.0)


def test_an_answer_that_is_only_an_article_stays_an_answer() -> None:
    assert strict_words("A.") == ["a"]
    assert word_scores("A", "a")[3] == 1.0


def test_vqa_normaliser_decides_by_the_whole_text() -> None:
    assert vqa_normalise("well-differentiated") == "well differentiated"
    assert vqa_normalise("well-differentiated - yes") == "welldifferentiated yes"
    assert vqa_normalise("(b) 10,000 cells; x/y") == "b 10000 cells xy"
    assert vqa_normalise("dont hed've two none of the 3.5 mm.") == "don't he'd've 2 0 of 3.5 mm"
    assert vqa_normalise("a." * 40) == "a" * 32 + "a." * 8


def test_llava_med_recall_rises_with_repeated_words() -> None:
    # tp = 3 (fat, three times in the prediction), fn = 1 (cells), fp = 2 (and).
    said, gold = metric_words("fat and fat and fat"), metric_words("fat cells")
    assert token_scores(said, gold) == (3 / 5, 3 / 4, 2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4))


def test_four_closed_rules_differ_where_metrics_says_so() -> None:
    def all_rules(item: Item) -> list[float | None]:
        names = ("llava-med", "llava-med-batch", "llava-med-pvqa", "quilt", "strict")
        return [PROTOCOLS[name].rate(item).closed for name in names]

    assert all_rules(closed("a nodule")) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert all_rules(closed("unclear", "yes")) == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert all_rules(closed("yes", "no")) == [0.0, 0.0, DROPPED, 0.0, 0.0]
    assert all_rules(closed("cannot tell", "maybe"))[:4] == [0.0, 0.0, DROPPED, None]


def test_bleu_follows_its_definition() -> None:
    said, gold = list("abcde"), list("abcdfg")
    brevity = math.exp(1 - 6 / 5)
    uniform, first, second, third = sentence_bleu(said, gold)
    assert first == pytest.approx(brevity * 4 / 5)
    assert second == pytest.approx(brevity * 3 / 4)
    assert third == pytest.approx(brevity * 2 / 3)
    assert uniform == pytest.approx(brevity * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert sentence_bleu(["x"], gold) == (0.0, 0.0, 0.0, 0.0)
    assert sentence_bleu([], gold) == (0.0, 0.0, 0.0, 0.0)


def test_open_accuracy_maps_onto_the_nearest_candidate() -> None:
    candidates = CandidateAnswers(["liver", "the kidney cortex", 3])
    assert candidates.open_accuracy("The liver, I think", "liver") == 1.0
    assert candidates.open_accuracy("kidney", "kidney cortex") == 1.0
    assert candidates.open_accuracy("three", "3") == 1.0
    assert candidates.open_accuracy("", "liver") == 1.0  # all shares 0: the first is chosen


def test_a_megabyte_of_text_is_normalised() -> None:
    text = "well-differentiated gland, " * 40_000
    assert normal(text).startswith("well differentiated gland")
    assert word_scores(text, "gland")[1] == 1.0


def test_an_unknown_protocol_is_named_with_its_neighbour() -> None:
    with pytest.raises(CloverError, match="no protocol 'llavamed'; did you mean 'llava-med'"):
        find_protocols("strict,llavamed")
