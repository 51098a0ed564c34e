"""The stated rule of "equal in meaning", and the shares made from it."""

import pytest

from ultravox.evaluation.answers import equal_in_meaning, score_answers
from ultravox.evaluation.scoring import Bootstrap


@pytest.mark.parametrize(
    ("question", "reference", "answer", "equal"),
    [
        ("Where?", "Paris.", "paris", True),  # (1) the same after normalisation
        ("What is the capital of France?", "The capital is Paris.", "It is Paris, the capital of France.", True),  # (2)
        ("What is the capital of France?", "The capital of France is Paris.", "The capital of France is Rome.", False),
        ("What is the capital of France?", "The capital of France is Paris.", "what is the capital of france", False),
        ("How many legs has a spider?", "Eight.", "A spider has 8 legs.", True),  # numbers are normalised
        ("How many legs has a spider?", "Eight.", "A spider has six legs.", False),
        (  # (3) F1 of content words
            "How do I get a new password?",
            "You can reset it on the settings page of your account.",
            "Go to your account settings page to reset the password.",
            True,
        ),
        ("How do I get a new password?", "You can reset it on the settings page.", "The weather is nice today.", False),
        ("Is it open?", "Yes, it is open.", "No, it is open.", False),
        ("Is it open?", "Yes.", "Yes, it is.", True),
        ("Say hello to Peter.", "Hello, Peter!", "Hello there, Peter!", True),  # nothing but the question's words
        ("Where?", "Paris", "", False),
        ("", "", "", True),
        ("", "it is", "it was", False),  # nothing but function words: only (1) applies
    ],
)
def test_rule(question, reference, answer, equal):
    assert equal_in_meaning(reference, answer, question) is equal


def test_shares_and_paired_difference():
    questions = ["capital of France", "legs of a spider", "who wrote it", "a red fruit"] * 10
    references = ["Paris", "Eight legs", "Hamlet", "Cherry"] * 10
    swapped = references[1:] + references[:1]
    result, verdicts = score_answers(
        questions, references, {"audio": references, "swapped": swapped, "text": "left out"}, Bootstrap(("",) * 40)
    )
    assert result["share"] == 1.0
    assert result["n"] == 40
    assert result["swapped"]["share"] == result["swapped_share"] == result["echo"]["share"] == 0.0
    assert result["difference"]["value"] == 1.0
    assert result["difference"]["interval"][0] > 0
    assert result["text"] == {"share": None, "interval": None, "absent": "left out"}
    assert result["cascade"]["absent"] == "not run"
    assert "F1" in result["rule"]
    assert verdicts["audio"] == [True] * 40
