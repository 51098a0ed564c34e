"""Transcripts that have run away: the same words over and over, which a small model falls into on long audio."""

from collections.abc import Sequence

#: Tokens that must be repetition before a transcript counts as run away, the first time included. People do say
#: "five five five five" and "bye bye bye"; hardly anyone says six tokens and at once the same six again.
MIN_REPEATED_TOKENS = 12
MIN_TIMES = 2


def repeated_tail(tokens: Sequence[int]) -> int:
    """How many of the last tokens only repeat what stands before them; 0 where the end is no repetition.

    An end is one when it consists of the same tokens at least twice in a row, and of 12 tokens or more in all.
    """
    for period in range(1, len(tokens) // MIN_TIMES + 1):
        times = max(MIN_TIMES, -(-MIN_REPEATED_TOKENS // period))
        if period * times > len(tokens):
            continue
        tail = list(tokens[-period * times :])
        if tail == tail[:period] * times:
            return period * (times - 1)
    return 0
