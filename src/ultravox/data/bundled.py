"""The datasets that have names: made or downloaded on first use."""

from pathlib import Path

from ultravox.data.asterisk import fetch_asterisk_en
from ultravox.data.synthesize import DEFAULT_MINUTES, fetch_spoken_requests_en, fetch_synthetic_en, make_stand_in
from ultravox.errors import DataError

DESCRIPTIONS = {
    "asterisk-en": "551 telephone prompts read by Allison Smith, from Debian (CC-BY-SA 3.0)",
    "synthetic-en": "sentences for vocabulary, two synthetic voices",
    "spoken-requests-en": "422 short spoken requests, two synthetic voices",
}


def fetch_dataset(name: str, minutes: float = DEFAULT_MINUTES) -> Path:
    """The folder of a bundled dataset; ``minutes`` is the length of ``synthetic-en``. DataError for another name."""
    if name == "asterisk-en":
        return fetch_asterisk_en(make_stand_in)
    if name == "synthetic-en":
        return fetch_synthetic_en(minutes)
    if name == "spoken-requests-en":
        return fetch_spoken_requests_en()
    raise DataError(f"no bundled dataset {name!r}: expected one of {', '.join(DESCRIPTIONS)}")
