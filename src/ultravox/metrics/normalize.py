"""The text normaliser that every English error rate in this project is computed after.

It is Whisper's own English normaliser (Radford et al. 2022, appendix C), from the package ``whisper-normalizer``: lower
case, no punctuation, contractions spelled out, numbers as digits, British spelling to American. Results name it and its
version, because a word error rate means nothing without them.
"""

import re
import unicodedata
from functools import lru_cache
from importlib.metadata import version

NORMALISER_NAME = "whisper-normalizer EnglishTextNormalizer, typographic apostrophes made plain first"

# The English normaliser knows contractions by the plain apostrophe only: "don’t" would become the two words "don t".
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'", "\u00b4": "'", "\uff07": "'"})


@lru_cache(maxsize=1)
def _english():
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def normaliser_identity() -> dict[str, str]:
    """Name and version of the normaliser, as written into results."""
    return {"name": NORMALISER_NAME, "version": version("whisper-normalizer")}


@lru_cache(maxsize=65536)
def normalize_english(text: str) -> str:
    """Whisper's English normalisation of one text: words separated by one space, possibly the empty string."""
    return " ".join(_english()(text.translate(_APOSTROPHES)).split())


# Nothing that the normaliser takes out whole (what stands in brackets, "hmm" and the like) holds such a word outside.
_KEPT_WORD = re.compile(r"(?a:\b[a-z]{4})", re.IGNORECASE)
_BRACKETS = re.compile(r"[\[\]()<>]")


def is_said(text: str) -> bool:
    """Whether `normalize_english` leaves anything of a text; most often found without it."""
    return bool(_KEPT_WORD.search(text) and not _BRACKETS.search(text)) or bool(normalize_english(text))


def spoken_form(text: str) -> str:
    """Words alone, in lower case: letters with their combining marks, digits, apostrophes, single spaces."""
    kept = (c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text.translate(_APOSTROPHES).lower())
    return " ".join("".join(kept).split())
