"""The normaliser: what counts as the same words."""

import numpy as np
import pytest

from ultravox.metrics.normalize import is_said, normaliser_identity, normalize_english


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("It's here.", "it is here"),
        ("Don\u2019t hang up!", "don't hang up"),  # typographic and plain apostrophes are the same word
        ("twenty-one", "21"),
        ("the colour", "The color"),
        ("um, hold  on", "hold on"),
        ("Mr. Smith", "mister smith"),
    ],
)
def test_same_words(one, other):
    assert normalize_english(one) == normalize_english(other)


def test_different_words_stay_different():
    assert normalize_english("can") != normalize_english("can't")
    assert normalize_english("") == ""


def test_identity_names_a_version():
    identity = normaliser_identity()
    assert "whisper-normalizer" in identity["name"]
    assert identity["version"][0].isdigit()


def test_whether_anything_is_said_is_what_the_normaliser_leaves():
    pieces = ["um", "Hmm,", "mhm", "uhhh", "(door slams)", "[music]", "<noise>", "(", "]", "word", "four", "it's", "no"]
    pieces += ["über", "Ünïcödé", "привет", "日本語", "42", "£5", "...", "a-b", "ok"]
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(pieces, count)) for count in random.integers(0, 5, 2000)]
    found = [is_said(text) for text in texts]
    assert found == [normalize_english(text) != "" for text in texts]
    assert 0 < sum(found) < len(texts)
