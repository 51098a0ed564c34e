"""A random order of n things that is computed place by place: what stands at place j, without making the whole order.

A Feistel network over the next power of two (Luby and Rackoff, "How to construct pseudorandom permutations", 1988) with
cycle walking: what falls outside [0, n) goes through again until it falls inside (Black and Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002, method 2). It depends on no library's random numbers but NumPy's SeedSequence,
which is promised never to change.
"""

from collections.abc import Sequence

import numpy as np

ROUNDS = 8  # four would do for a cipher's proof; small domains mix better with more
LEAST_BITS = 6  # in less, not every order would be as likely: 120 orders of 5 things have chi-square 328, here 125
CHUNK = 1 << 15  # places that go through all rounds together: they stay in the processor's cache


def mix(values: np.ndarray, key: int) -> np.ndarray:
    """Hash of uint32 values under a key: MurmurHash3's 32-bit finaliser (Appleby), which spreads each bit."""
    x = values ^ np.uint32(key)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x


def round_keys(seed: Sequence[int], count: int = ROUNDS) -> list[int]:
    """Keys of 32 bits from non-negative integers."""
    return np.random.SeedSequence(list(seed)).generate_state(count, np.uint32).tolist()


class Permutation:
    """A permutation of [0, size), chosen by the seed."""

    def __init__(self, size: int, seed: Sequence[int]) -> None:
        """Args:
        size: how many things, 1 to 2^62.
        seed: non-negative integers; another seed is another order.
        """
        self.size, self._keys = size, round_keys(seed)
        bits = max(LEAST_BITS, (size - 1).bit_length())
        self._low_bits = bits // 2
        self._high_mask, self._low_mask = (1 << (bits - self._low_bits)) - 1, (1 << self._low_bits) - 1

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at each place, [place] → [place], int64. Places are in [0, size)."""
        found = np.empty(len(places), dtype=np.int64)
        for start in range(0, len(places), CHUNK):
            found[start : start + CHUNK] = self._walk(places[start : start + CHUNK])
        return found

    def _walk(self, places: np.ndarray) -> np.ndarray:
        x = self._once(places.astype(np.uint64))
        outside = np.flatnonzero(x >= self.size)
        while len(outside):  # half of the domain at most is outside, if there are 33 places: this halves each time
            again = self._once(x[outside])
            x[outside] = again
            outside = outside[again >= self.size]
        return x.astype(np.int64)

    def _once(self, x: np.ndarray) -> np.ndarray:
        high = (x >> np.uint64(self._low_bits)).astype(np.uint32)
        low = x.astype(np.uint32) & np.uint32(self._low_mask)
        for high_key, low_key in zip(self._keys[::2], self._keys[1::2], strict=True):
            high ^= mix(low, high_key) & np.uint32(self._high_mask)
            low ^= mix(high, low_key) & np.uint32(self._low_mask)
        return (high.astype(np.uint64) << np.uint64(self._low_bits)) | low
