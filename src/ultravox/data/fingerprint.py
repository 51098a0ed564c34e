"""Short names for content: two things with one fingerprint are the same thing."""

import hashlib
from collections.abc import Sequence


def fingerprint(parts: Sequence[str]) -> str:
    """Hex SHA-256 of a list of strings: two lists with one fingerprint are the same list."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def uid(source_fingerprint: str, row_id: str) -> str:
    """The name of an example that stays the same over runs and machines: 16 hex digits (64 bits).

    Among 10 million examples, two share a name with probability 3e-6.
    """
    return fingerprint([source_fingerprint, row_id])[:16]
