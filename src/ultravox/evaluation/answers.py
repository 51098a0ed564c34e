"""Spoken questions: does the model answer what was said as its language model answers the text?

The reference is what the base language model itself answered to the text (continuation). Whether two answers mean the
same is decided by a rule that anyone can apply by hand, not by a judge. It is blind to word order and to most
negations, so the same share with swapped audio stands beside it: what the rule gives for answers to another question.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from ultravox.evaluation.scoring import Bootstrap, absent
from ultravox.metrics.normalize import normalize_english

F1_THRESHOLD = 0.5
MAX_KEY_WORDS = 3

# Function words that carry no answer. "yes", "no" and "not" are left in: they are answers.
STOP_WORDS = frozenset(
    "a about also am an and any are as at be been being but by can could did do does for from had has have he her "
    "here him his how i if in into is it its just let may me might more most my of on or our out shall she should "
    "so some such than that the their them then there these they this those to too up us very was we were what "
    "when where which while who whom whose why will with would you your".split()
)

RULE = (
    "Both texts are normalised (see normaliser) and function words are dropped; the rest are content words. An answer "
    "equals the reference when (1) the normalised texts are the same; or (2) the reference has at most "
    f"{MAX_KEY_WORDS} different content words and the answer contains all of them; or (3) the F1 of the two bags of "
    f"content words is at least {F1_THRESHOLD}. A text that begins with yes never equals one that begins with no."
)


def _content(words: Sequence[str]) -> Counter[str]:
    return Counter(word for word in words if word not in STOP_WORDS)


def equal_in_meaning(reference: str, answer: str) -> bool:
    """Whether an answer counts as the reference's equal under ``RULE``."""
    expected, given = normalize_english(reference).split(), normalize_english(answer).split()
    if expected == given:
        return True
    if not expected or not given or {expected[0], given[0]} == {"yes", "no"}:
        return False
    expected_content, given_content = _content(expected), _content(given)
    if not expected_content or not given_content:
        return False
    if len(expected_content) <= MAX_KEY_WORDS and set(expected_content) <= set(given_content):
        return True
    shared = (expected_content & given_content).total()
    return 2 * shared / (expected_content.total() + given_content.total()) >= F1_THRESHOLD


def _share(equal: Sequence[bool], bootstrap: Bootstrap) -> dict:
    ones = [1] * len(equal)
    return {"share": sum(equal) / len(equal), "interval": bootstrap.interval([int(e) for e in equal], ones)}


def score_answers(
    references: Sequence[str],
    answers: Mapping[str, Sequence[str] | str],
    bootstrap: Bootstrap,
) -> tuple[dict, dict[str, list[bool]]]:
    """Shares of answers equal in meaning to the references.

    Args:
        references: the base language model's answers to the texts.
        answers: "audio" is scored; beside it "swapped", "text" (the question as text: upper bound) and "cascade"
            (Whisper's text). A string in place of a list is the reason why that one is absent.

    Returns:
        the ``answers`` object of results.json, and for each kind whether each answer is equal.
    """
    verdicts = {
        kind: [equal_in_meaning(reference, text) for reference, text in zip(references, texts, strict=True)]
        for kind, texts in answers.items()
        if not isinstance(texts, str)
    }
    result = {**_share(verdicts["audio"], bootstrap), "n": len(references)}
    for kind in ("swapped", "text", "cascade"):
        given = answers.get(kind, "not run")
        scored = absent(given, "share") if isinstance(given, str) else _share(verdicts[kind], bootstrap)
        result |= {f"{kind}_{key}": value for key, value in scored.items()}
    if "swapped" in verdicts:
        ones = [1] * len(references)
        difference = bootstrap.difference(
            [int(e) for e in verdicts["swapped"]], [int(e) for e in verdicts["audio"]], ones
        )
        result["difference"] = difference.as_dict()
    result |= {"rule": RULE, "reference": "the base language model's own answer to the text"}
    return result, verdicts
