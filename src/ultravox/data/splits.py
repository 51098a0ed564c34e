"""Which texts are held out: a rule on the text alone, so that the same words can never be on both sides."""

import hashlib
import re
from collections.abc import Iterable

HELDOUT_SHARE = 5  # one text in five
MIN_CONTAINED_WORDS = 3  # shorter held-out texts ("yes", "thank you") may occur inside other sentences


def normalise_text(text: str) -> str:
    """Lower case; everything but a-z, 0-9 and the apostrophe becomes a space; spaces collapsed."""
    return " ".join(re.sub(r"[^a-z0-9']+", " ", text.lower()).split())


def is_heldout(text: str) -> bool:
    """Whether a text belongs to the held-out split: SHA-256 of its normalised form, modulo five, is zero."""
    return int(hashlib.sha256(normalise_text(text).encode()).hexdigest(), 16) % HELDOUT_SHARE == 0


class HeldoutFilter:
    """Refuses texts that equal a held-out text, or contain one of three words or more as neighbouring words."""

    def __init__(self, heldout_texts: Iterable[str]) -> None:
        self._texts = {normalise_text(text) for text in heldout_texts} - {""}
        self._contained = [f" {text} " for text in self._texts if len(text.split()) >= MIN_CONTAINED_WORDS]

    @property
    def digest(self) -> str:
        """SHA-256 of the held-out texts, which decide what is refused."""
        return hashlib.sha256("\n".join(sorted(self._texts)).encode()).hexdigest()

    def allows(self, text: str) -> bool:
        """True when the text may be used for training."""
        normalised = normalise_text(text)
        return normalised not in self._texts and not any(part in f" {normalised} " for part in self._contained)
