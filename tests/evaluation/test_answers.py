"""The stated rule of "equal in meaning", and the shares made from it."""

import pytest

from ultravox.evaluation.answers import equal_in_meaning, score_answers
from ultravox.evaluation.scoring import Bootstrap


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        ("Paris.", "paris", True),  # (1) the same after normalisation
        ("The capital is Paris.", "It is Paris, the capital of France.", True),  # (2) all key words
        ("Eight.", "A spider has 8 legs.", True),  # numbers are normalised
        ("Eight.", "A spider has six legs.", False),
        (  # (3) F1 of content words
            "You can reset your password on the settings page of your account.",
            "Go to your account settings page to reset the password.",
            True,
        ),
        ("You can reset your password on the settings page.", "The weather is nice today in the park.", False),
        ("Yes, it is open.", "No, it is open.", False),
        ("Yes.", "Yes, it is.", True),
        ("Paris", "", False),
        ("", "", True),
        ("it is", "it was", False),  # nothing but function words: only (1) applies
    ],
)
def test_rule(reference, answer, equal):
    assert equal_in_meaning(reference, answer) is equal


def test_shares_and_paired_difference():
    references = ["Paris", "Eight legs", "Hamlet", "Cherry"] * 10
    swapped = references[1:] + references[:1]
    result, verdicts = score_answers(
        references, {"audio": references, "swapped": swapped, "text": "left out"}, Bootstrap(("",) * 40)
    )
    assert result["share"] == 1.0
    assert result["n"] == 40
    assert result["swapped_share"] == 0.0
    assert result["difference"]["value"] == 1.0
    assert result["difference"]["interval"][0] > 0
    assert (result["text_share"], result["text_absent"]) == (None, "left out")
    assert "F1" in result["rule"]
    assert verdicts["audio"] == [True] * 40
