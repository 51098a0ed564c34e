"""The normaliser: what counts as the same words."""

import pytest

from ultravox.metrics.normalize import normaliser_identity, normalize_english


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
