"""Rows that cannot be used: set aside, counted by reason, and too many of them stop the run.

Whoever reads rows (a source, the feature cache, ``data prepare``) adds what it sets aside; whoever called it decides
how much is too much.
"""

import re
from collections.abc import Iterable, Mapping

from ultravox.audio.content import Audio
from ultravox.errors import AudioError, DataError

WHERE = re.compile(r"(shard \d+, )?(line|row) \d+$")

#: Another row of the split has the id.
ID_TWICE = "id twice"

#: A streamed row that the stage's objective cannot use, such as one without a transcript.
UNFIT_FOR_OBJECTIVE = "not fit for the stage's objective"

#: Reasons for leaving a row out that the configuration asks for. They are counted, and are no fault of the row.
ASKED_FOR = ("too short", "too long", "too slow", "too fast", "other language", UNFIT_FOR_OBJECTIVE)


class Quarantine:
    """Reason → names (ids or audio files) of the rows that are left out for it, in the order in which they came."""

    def __init__(self) -> None:
        self.reasons: dict[str, list[str]] = {}
        self._seen: set[tuple[str, str]] = set()
        self._rows: set[str] = set()

    def add(self, reason: str, name: str) -> None:
        """Set a row aside; the same row a second time for the same reason counts once."""
        if (reason, name) not in self._seen:
            self._seen.add((reason, name))
            self.reasons.setdefault(reason, []).append(name)

    def add_row(self, reason: str, name: str, place: str) -> str:
        """Set aside a row that stands at a place ("file, line 3"), and say under which name.

        A second row of one name goes by its place too, so that it counts as another.
        """
        if reason == ID_TWICE or name in self._rows:
            where = WHERE.search(place)
            name = f"{name} ({where[0] if where else place})"
        self._rows.add(name)
        self.add(reason, name)
        return name

    def update(self, reasons: Mapping[str, Iterable[str]]) -> None:
        """Add what another quarantine holds."""
        for reason, names in reasons.items():
            for name in names:
                self.add(reason, name)

    def counts(self) -> dict[str, int]:
        """Rows by reason."""
        return {reason: len(names) for reason, names in self.reasons.items()}

    def faults(self) -> dict[str, list[str]]:
        """What is wrong with rows, without the reasons that the configuration asked for."""
        return {reason: names for reason, names in self.reasons.items() if reason not in ASKED_FOR}

    def require(
        self, max_share: float, total: int, option: str = "data.max_quarantine_share", *, coming: int = 0
    ) -> None:
        """Raise a DataError when more than `max_share` of `total` rows are faulty.

        Args:
            max_share: 0 to 1.
            total: rows that there were, the faulty ones included.
            option: the setting that `max_share` comes from, for the message.
            coming: rows that may still come: too many are those that were too many if none of these were faulty.
        """
        faults = self.faults()
        bad = dict.fromkeys(name for names in faults.values() for name in names)
        if len(bad) > max_share * (total + coming):
            reasons = ", ".join(f"{len(names)} {reason}" for reason, names in sorted(faults.items()))
            raise DataError(
                f"{len(bad)} of {total} clips cannot be used ({reasons}), more than {option} = {max_share:g} allows; "
                f"the first is {next(iter(bad))}: repair or remove them, or raise the share"
            )


def audio_fault(error: AudioError, audio: Audio) -> str:
    """The kind of fault of a recording in a few words, to count by."""
    message = str(error).replace(str(audio), "")
    kinds = {
        "is too short": "too short",
        "does not exist": "missing audio",
        "cannot be read": "missing audio",
        "is not there": "missing audio",
        "no audio samples": "without samples",
        "not numbers": "with NaN or infinite samples",
        "truncated": "damaged or truncated",
        "0 bytes": "empty",
        " s or more: at most": "too long",
    }
    return next((kind for phrase, kind in kinds.items() if phrase in message), "not readable as audio")
