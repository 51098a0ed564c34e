"""BLEU by hand on a case small enough, chrF at its ends, and what is refused."""

import math

import pytest

from ultravox.metrics.overlap import bleu, chrf


def test_bleu_is_its_definition():
    """Modified precisions 5/6, 3/5, 1/4 and 0/3 (smoothed: 1/2 · 1/3), no brevity penalty."""
    score, signature = bleu(["the cat sat on the mat"], ["the cat is on the mat"])
    expected = math.exp(sum(map(math.log, (5 / 6, 3 / 5, 1 / 4, 1 / 6))) / 4)
    assert score == pytest.approx(100 * expected, rel=1e-6)
    assert "tok:13a" in signature
    assert "version:" in signature


def test_the_brevity_penalty():
    score, _ = bleu(["one two three four five six seven eight"], ["one two three four"])
    assert score == pytest.approx(100 * math.exp(1 - 8 / 4), rel=1e-6)


def test_both_pool_over_the_corpus():
    references, hypotheses = ["a b c d e", "f g h i j"], ["a b c d e", "x x x x x"]
    assert 0 < bleu(references, hypotheses)[0] < 100
    assert bleu(references, references)[0] == pytest.approx(100)
    score, signature = chrf(references, references)
    assert score == pytest.approx(100)
    assert "nc:6" in signature
    assert chrf(["abcdef"], ["uvwxyz"])[0] == 0


def test_texts_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="2 references, 1 hypotheses"):
        bleu(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no texts"):
        chrf([], [])
