"""Spoken questions: does the model answer what was said as its language model answers the text?

The reference is what the base language model itself answered to the text (continuation). Whether two answers mean the
same is decided by a rule that anyone can apply by hand, not by a judge. It is blind to word order and to most
negations, so the same share with swapped audio stands beside it: what the rule gives for answers to another question.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from ultravox.evaluation.scoring import Bootstrap, absent
from ultravox.metrics.normalize import normalize_english

KINDS = ("swapped", "echo", "text", "cascade")  # what stands beside the answers from audio
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
    "All texts are normalised (see normaliser) and function words are dropped; the rest are content words. Those of "
    "the question are dropped as well, so that repeating the question counts for nothing; where the reference has no "
    "others, all its content words stay. An answer equals the reference when (1) the normalised texts are the same; "
    f"or (2) the reference has at most {MAX_KEY_WORDS} different words left and the answer contains all of them; or "
    f"(3) the F1 of the two bags of words left is at least {F1_THRESHOLD}. A text that begins with yes never equals "
    "one that begins with no."
)


def _content(words: Sequence[str], without: Collection[str] = ()) -> Counter[str]:
    return Counter(word for word in words if word not in STOP_WORDS and word not in without)


def equal_in_meaning(reference: str, answer: str, question: str) -> bool:
    """Whether an answer counts as the reference's equal under ``RULE``."""
    expected, given = normalize_english(reference).split(), normalize_english(answer).split()
    if expected == given:
        return True
    if not expected or not given or {expected[0], given[0]} == {"yes", "no"}:
        return False
    asked = set(normalize_english(question).split())
    if not _content(expected, asked):
        asked = set()
    expected_content, given_content = _content(expected, asked), _content(given, asked)
    if not expected_content or not given_content:
        return False
    if len(expected_content) <= MAX_KEY_WORDS and set(expected_content) <= set(given_content):
        return True
    shared = (expected_content & given_content).total()
    return 2 * shared / (expected_content.total() + given_content.total()) >= F1_THRESHOLD


def _share(equal: Sequence[bool], bootstrap: Bootstrap) -> dict:
    ones = [1] * len(equal)
    return {"share": sum(equal) / len(equal), "interval": bootstrap.interval([int(e) for e in equal], ones)}


def absent_answers(reason: str) -> dict:
    """The ``answers`` object of an evaluation without spoken questions: every share is null, with the reason."""
    return absent(reason, "share") | {kind: absent(reason, "share") for kind in KINDS} | {"swapped_share": None}


def score_answers(
    questions: Sequence[str],
    references: Sequence[str],
    answers: Mapping[str, Sequence[str] | str],
    bootstrap: Bootstrap,
) -> tuple[dict, dict[str, list[bool]]]:
    """Shares of answers equal in meaning to the references.

    Args:
        questions: what was asked.
        references: the base language model's answers to the texts.
        answers: "audio" is scored; beside it "swapped", "text" (the question as text: upper bound) and "cascade"
            (Whisper's text). A string in place of a list is the reason why that one is absent.

    Returns:
        the ``answers`` object of results.json ("echo" in it is the question given back as its own answer), and for each
        kind whether each answer is equal.
    """
    verdicts = {
        kind: [equal_in_meaning(*texts) for texts in zip(references, given, questions, strict=True)]
        for kind, given in {**answers, "echo": questions}.items()
        if not isinstance(given, str)
    }
    result = {**_share(verdicts["audio"], bootstrap), "n": len(references)}
    for kind in KINDS:
        given = answers.get(kind, "not run")
        result[kind] = _share(verdicts[kind], bootstrap) if kind in verdicts else absent(str(given), "share")
    result["swapped_share"] = result["swapped"]["share"]
    if "swapped" in verdicts:
        ones = [1] * len(references)
        difference = bootstrap.difference(
            [int(e) for e in verdicts["swapped"]], [int(e) for e in verdicts["audio"]], ones
        )
        result["difference"] = difference.as_dict()
    result |= {"rule": RULE}
    return result, verdicts
