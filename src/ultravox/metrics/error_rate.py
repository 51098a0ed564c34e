"""Word and character error rates, pooled over a corpus: total errors over total length, never a mean of means.

Two utterances can have a pooled rate of 18% and a mean rate of 55%, so no function here averages rates. An utterance
whose reference is empty adds its insertions to the errors and nothing to the length.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rapidfuzz.distance import Levenshtein

from ultravox.metrics.normalize import normalize_english

Unit = Literal["word", "character"]


@dataclass(frozen=True, slots=True)
class ErrorCounts:
    """Edit operations against a reference of ``reference_length`` words (or characters). Adds up over utterances."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_length: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors over reference length; where nothing at all was said, each inserted word counts as a whole error."""
        return self.errors / max(1, self.reference_length)

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference_length + other.reference_length,
        )

    def as_dict(self) -> dict[str, int]:
        return {
            "substitutions": self.substitutions,
            "deletions": self.deletions,
            "insertions": self.insertions,
            "reference_length": self.reference_length,
        }


@dataclass(frozen=True, slots=True)
class Edit:
    """One step of an alignment; ``reference`` is None for an insertion, ``hypothesis`` is None for a deletion."""

    kind: Literal["equal", "substitution", "deletion", "insertion"]
    reference: str | None
    hypothesis: str | None


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Edit]:
    """A cheapest alignment of two token sequences, all edits costing 1 (Levenshtein), in reading order."""
    edits: list[Edit] = []
    for step in Levenshtein.opcodes(reference, hypothesis):
        said = reference[step.src_start : step.src_end]
        heard = hypothesis[step.dest_start : step.dest_end]
        if step.tag == "equal":
            edits += [Edit("equal", r, h) for r, h in zip(said, heard, strict=True)]
        elif step.tag == "replace":
            edits += [Edit("substitution", r, h) for r, h in zip(said, heard, strict=True)]
        elif step.tag == "delete":
            edits += [Edit("deletion", r, None) for r in said]
        else:
            edits += [Edit("insertion", None, h) for h in heard]
    return edits


def count_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCounts:
    """Errors of one token sequence against another."""
    operations = [operation.tag for operation in Levenshtein.editops(reference, hypothesis)]
    return ErrorCounts(
        operations.count("replace"), operations.count("delete"), operations.count("insert"), len(reference)
    )


def tokens(text: str, unit: Unit, normalize: Callable[[str], str] = normalize_english) -> list[str]:
    """The units that are compared: words of the normalised text, or its characters with single spaces between words."""
    text = normalize(text)
    return text.split() if unit == "word" else list(text)


def errors_per_utterance(
    references: Sequence[str],
    hypotheses: Sequence[str],
    unit: Unit = "word",
    normalize: Callable[[str], str] = normalize_english,
) -> list[ErrorCounts]:
    """Error counts of each utterance, after normalising both sides. ValueError when the lists differ in length."""
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses: they must pair up")
    return [
        count_errors(tokens(reference, unit, normalize), tokens(hypothesis, unit, normalize))
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    ]


def pool(counts: Iterable[ErrorCounts]) -> ErrorCounts:
    """Sum of the counts: what a corpus rate is computed from."""
    return sum(counts, ErrorCounts())


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Pooled word errors of a corpus, both sides normalised."""
    return pool(errors_per_utterance(references, hypotheses, "word"))


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Pooled character errors of a corpus, both sides normalised; spaces between words count as characters."""
    return pool(errors_per_utterance(references, hypotheses, "character"))


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Pooled, normalised word error rate as a fraction (0.3 = 30%); can exceed 1."""
    return word_errors(references, hypotheses).rate
