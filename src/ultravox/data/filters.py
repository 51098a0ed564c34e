"""Which clips of a source are used: limits on their length and their pace, and their languages."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ultravox.data.clip import Clip
from ultravox.errors import DataError


@dataclass(frozen=True, slots=True)
class Filters:
    """Limits that a clip must keep to; None = no limit. Seconds are of all its audio."""

    min_seconds: float | None = None
    max_seconds: float | None = None
    min_characters_per_second: float | None = None
    max_characters_per_second: float | None = None
    languages: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for unit in ("seconds", "characters_per_second"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least is not None and most is not None and least > most:
                raise DataError(f"min_{unit} = {least:g} is more than max_{unit} = {most:g}, so no clip is left")

    def reason(self, clip: Clip) -> str | None:
        """Why a clip is left out, in words of `quarantine.ASKED_FOR`; None = it is used.

        A text without audio has neither length nor pace, and a conversation's text has no pace.
        """
        if self.languages is not None and clip.language not in self.languages:
            return "other language"
        if clip.duration == 0:
            return None
        seconds = total_seconds(clip)
        if self.min_seconds is not None and seconds < self.min_seconds:
            return "too short"
        if self.max_seconds is not None and seconds > self.max_seconds:
            return "too long"
        least, most = self.min_characters_per_second, self.max_characters_per_second
        if clip.messages is not None or (least is None and most is None):
            return None
        pace = characters_per_second(clip)
        if least is not None and pace < least:
            return "too slow"
        return "too fast" if most is not None and pace > most else None


def total_seconds(clip: Clip) -> float:
    """Seconds of all the recordings of a clip."""
    return clip.duration + sum(seconds for _, seconds in clip.more_audio)


def num_characters(text: str) -> int:
    """Letters with their marks, digits, apostrophes, and one space between words: what is spoken of a text."""
    kept = (c if c in "'’" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return len(" ".join("".join(kept).split()))


def characters_per_second(clip: Clip) -> float:
    """Spoken characters for each second of the row's duration; 0 without audio."""
    return num_characters(clip.text) / clip.duration if clip.duration else 0.0
