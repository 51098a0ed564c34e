"""From texts to the numbers of results.json: each with n, its interval and, against another, a paired difference."""

from collections.abc import Sequence
from dataclasses import dataclass

from ultravox.metrics.bootstrap import NUM_SAMPLES, Difference, bootstrap_interval, paired_bootstrap, resampling_unit
from ultravox.metrics.error_rate import ErrorCounts, Unit, errors_per_utterance, pool


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals are drawn: number of resamples, seed, and the speaker of each clip (empty where unknown)."""

    speakers: tuple[str, ...]
    num_samples: int = NUM_SAMPLES
    seed: int = 0

    def as_dict(self) -> dict:
        unit = resampling_unit(self.speakers)
        return {
            "method": "percentile",
            "confidence": 0.95,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "unit": unit,
        }

    def interval(self, errors: Sequence[int], lengths: Sequence[int]) -> list[float]:
        low, high = bootstrap_interval(
            errors, lengths, groups=self.speakers, num_samples=self.num_samples, seed=self.seed
        )
        return [low, high]

    def difference(self, first: Sequence[int], second: Sequence[int], lengths: Sequence[int]) -> Difference:
        return paired_bootstrap(
            first, second, lengths, groups=self.speakers, num_samples=self.num_samples, seed=self.seed
        )


class Score:
    """Error counts of one system on the clips, and what is reported of them."""

    def __init__(self, references: Sequence[str], hypotheses: Sequence[str], bootstrap: Bootstrap, unit: Unit = "word"):
        self.per_clip: list[ErrorCounts] = errors_per_utterance(references, hypotheses, unit)
        self.unit = unit
        self.bootstrap = bootstrap

    @property
    def errors(self) -> list[int]:
        return [counts.errors for counts in self.per_clip]

    @property
    def lengths(self) -> list[int]:
        return [counts.reference_length for counts in self.per_clip]

    @property
    def rate(self) -> float:
        return pool(self.per_clip).rate

    def as_dict(self, key: str = "value") -> dict:
        """``{key: rate, interval, n, num_words | num_characters, counts}``."""
        total = pool(self.per_clip)
        return {
            key: total.rate,
            "interval": self.bootstrap.interval(self.errors, self.lengths),
            "n": len(self.per_clip),
            f"num_{self.unit}s": total.reference_length,
            "counts": total.as_dict(),
        }

    def minus(self, other: "Score") -> Difference:
        """This system's rate minus the other's, on the same clips."""
        return self.bootstrap.difference(other.errors, self.errors, self.lengths)


def absent(reason: str, key: str = "wer") -> dict:
    """A score that was not measured, and why. It is null, never zero."""
    return {key: None, "interval": None, "absent": reason}


def audio_use(real: Score, swapped: Score | None, reason: str = "") -> dict:
    """PASS when swapped audio is clearly worse: the paired 95% interval of the difference lies above zero."""
    if swapped is None:
        return {"verdict": "UNKNOWN", "reason": reason}
    difference = swapped.minus(real)
    clearly = difference.interval[0] > 0
    text = (
        "swapped audio is clearly worse, so the model uses the audio"
        if clearly
        else "swapped audio is not clearly worse: the model does not use the audio"
    )
    return {"verdict": "PASS" if clearly else "FAIL", "reason": text, "difference": difference.as_dict()}
