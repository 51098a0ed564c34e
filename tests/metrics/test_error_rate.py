"""Golden cases of the error rates, and agreement with jiwer."""

import random

import jiwer
import pytest

from ultravox.metrics.error_rate import (
    ErrorCounts,
    align,
    character_errors,
    count_errors,
    errors_per_utterance,
    pool,
    word_error_rate,
    word_errors,
)


def test_pooled_not_mean_of_means():
    # 2 errors in 11 words: 18%. The mean of the two utterances' rates would be 55%, their maximum 100%.
    references = ["one red fox saw ten blue birds in may again", "goodbye"]
    hypotheses = ["one red fox saw ten blue birds in may", "hello"]
    counts = word_errors(references, hypotheses)
    rates = [c.rate for c in errors_per_utterance(references, hypotheses)]
    assert counts.reference_length == 11
    assert counts.rate == pytest.approx(2 / 11)
    assert rates == [pytest.approx(0.1), 1.0]
    assert counts.rate != pytest.approx(sum(rates) / 2)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("please hold the line", "please hold the line", (0, 0, 0, 4)),
        ("please hold the line", "please fold the line", (1, 0, 0, 4)),
        ("please hold the line", "please the line", (0, 1, 0, 4)),
        ("please hold the line", "please hold on the line", (0, 0, 1, 4)),
        ("please hold the line", "", (0, 4, 0, 4)),
        ("It's Jim's.", "it is jim is", (0, 0, 0, 4)),
        ("don\u2019t", "do not", (0, 0, 0, 2)),
    ],
)
def test_golden(reference, hypothesis, expected):
    assert word_errors([reference], [hypothesis]) == ErrorCounts(*expected)


def test_empty_reference_counts_insertions():
    counts = word_errors(["", "two apples"], ["thank you", "two apples"])
    assert counts == ErrorCounts(0, 0, 2, 2)
    assert counts.rate == 1.0
    only_empty = word_errors([""], ["thank you"])
    assert (only_empty.insertions, only_empty.reference_length) == (2, 0)
    assert only_empty.rate == 2.0  # and no division by zero
    assert word_errors([""], [""]).rate == 0.0
    assert word_errors([], []).rate == 0.0


def test_rate_can_exceed_one():
    assert word_error_rate(["hello"], ["well hello there friend"]) == 3.0


def test_character_errors():
    assert character_errors(["cat sat"], ["cats at"]).errors == 2  # a space deleted, a space inserted
    assert character_errors(["abc"], ["abd"]).rate == pytest.approx(1 / 3)


def test_lists_must_pair_up():
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        word_errors(["a", "b"], ["a"])


def test_alignment_tells_the_counts():
    reference, hypothesis = "the quick brown fox".split(), "a quick fox jumps".split()
    edits = align(reference, hypothesis)
    assert [e.reference for e in edits if e.reference is not None] == reference
    assert [e.hypothesis for e in edits if e.hypothesis is not None] == hypothesis
    assert sum(e.kind != "equal" for e in edits) == count_errors(reference, hypothesis).errors


def test_agrees_with_jiwer_on_random_texts():
    rng = random.Random(0)
    words = "alpha beta gamma delta epsilon".split()
    references = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(200)]
    hypotheses = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(200)]
    counts = pool(errors_per_utterance(references, hypotheses, normalize=str))
    theirs = jiwer.process_words(references, hypotheses)
    assert counts.errors == theirs.substitutions + theirs.deletions + theirs.insertions
    assert counts.rate == pytest.approx(theirs.wer)
    assert character_errors(references, hypotheses).rate == pytest.approx(jiwer.cer(references, hypotheses))
