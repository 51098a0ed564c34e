"""Which examples go into which batch: a pure function of the examples' lengths, a seed and the epoch.

So the place in the data order is a few integers, and a resumed run needs nothing else. Examples of like length go
together, where a batch is padded to its longest; with `best_fit`, a batch is one sequence that many examples share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ultravox.data.packing import pack
from ultravox.errors import DataError

Mode = Literal["padded", "packed", "best_fit"]

#: Lengths are sorted after a random stretch of up to this share, so that each epoch mixes its batches anew.
LENGTH_JITTER = 0.02
#: Examples whose lengths differ by up to this share are sorted by their audio instead, where they fill many batches.
STRATUM_WIDTH = 0.04
STRATUM_BATCHES = 8
#: The last so many batches are cut evenly, instead of leaving a small one over.
EVEN_BATCHES = 32


class MemoryModel(Protocol):
    """What a batch takes on the device."""

    def predict(self, num_rows: np.ndarray, audio_tokens: np.ndarray, text_tokens: np.ndarray) -> np.ndarray:
        """Bytes for batches of so many rows whose longest have so many tokens, each [batch].

        It does not fall when a number grows.
        """
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one batch may hold."""

    max_batch_tokens: int
    """padded: rows × the longest; packed and best_fit: the sum."""
    mode: Mode = "padded"
    """padded: rows are padded to the longest. packed: they are not, but attention pads inside, so they are of like
    length. best_fit: any lengths share a sequence, under a block mask."""
    memory: MemoryModel | None = None
    max_batch_bytes: int | None = None
    """Of what `memory` predicts."""


@dataclass(frozen=True, slots=True)
class Batches:
    """Batches of items, one behind the other."""

    items: np.ndarray
    """Each item once, [item]."""
    ends: np.ndarray
    """Where each batch ends in `items`, [batch]."""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"batch {index} of {len(self.ends)}")
        return self.items[self.ends[index - 1] if index else 0 : self.ends[index]]


def require_budget(longest: int, max_batch_tokens: int) -> None:
    """Raise a DataError when the longest example does not fit into a batch."""
    if longest > max_batch_tokens:
        raise DataError(
            f"the longest example has {longest} tokens, but max_batch_tokens is {max_batch_tokens}: "
            "raise max_batch_tokens or lower data.max_audio_seconds"
        )


def require_memory(audio: np.ndarray, text: np.ndarray, limits: Limits) -> None:
    """Raise a DataError when an example alone, [item], does not fit into the memory."""
    if limits.memory is None or limits.max_batch_bytes is None or not len(audio):
        return
    needed = limits.memory.predict(np.ones(len(audio), dtype=np.int64), audio, text)
    if (worst := int(np.argmax(needed))) >= 0 and needed[worst] > limits.max_batch_bytes:
        raise DataError(
            f"the largest example ({audio[worst]} tokens of audio, {text[worst]} of text) needs "
            f"{needed[worst] / 1e9:.2f} GB, but a batch may take {limits.max_batch_bytes / 1e9:.2f} GB: raise "
            f"max_batch_memory_gb, lower data.max_audio_seconds, or train fewer parts"
        )


def plan_batches(
    lengths: np.ndarray | Sequence[int], max_batch_tokens: int, seed: int, epoch: int, *, count_padding: bool = True
) -> list[np.ndarray]:
    """Cut one epoch into batches of like length, in random order.

    Args:
        lengths: tokens of each example, [item].
        max_batch_tokens: budget of one batch.
        seed: of the run.
        epoch: counts from 0.
        count_padding: whether padding counts in the budget; what is packed has none.

    Returns: arrays of item indices; every item is in exactly one.

    Raises:
        DataError: an example is longer than the budget, or has no length.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    limits = Limits(max_batch_tokens, "padded" if count_padding else "packed")
    batches = plan(tokens, np.zeros_like(tokens), limits, [seed, epoch])
    return [batches[index] for index in range(len(batches))]


def plan(audio: np.ndarray, text: np.ndarray, limits: Limits, seed: Sequence[int]) -> Batches:
    """Cut items into batches that respect all limits, in random order.

    Args:
        audio, text: tokens of each item, [item]; an item's length is their sum.
        limits: of a batch.
        seed: non-negative integers: of the run, the epoch, the part of the epoch.

    Raises:
        DataError: no items, an item without length, or one that does not fit into a batch of its own.
    """
    if len(audio) == 0:
        raise DataError("no examples to plan batches from: check data.sources and the length limits")
    audio, text = np.asarray(audio, dtype=np.int64), np.asarray(text, dtype=np.int64)
    total = audio + text
    if (shortest := int(total.argmin())) >= 0 and total[shortest] < 1:
        raise DataError(f"example {shortest} has length {total[shortest]}: expected at least 1")
    require_budget(int(total.max()), limits.max_batch_tokens)
    require_memory(audio, text, limits)
    random = np.random.default_rng(list(seed))
    if limits.mode == "best_fit":
        items, ends = pack(total, limits.max_batch_tokens, random)
        ends = _halve_too_large(audio[items], text[items], ends, limits)
    else:
        items = _sorted(audio, total, limits.max_batch_tokens, random)
        ends = _Cutter(audio[items], text[items], limits).even_ends()
    return _shuffled(items, ends, random)


def _sorted(audio: np.ndarray, total: np.ndarray, budget: int, random: np.random.Generator) -> np.ndarray:
    """Items in an order in which neighbours have like lengths, in all and of audio, [item].

    They are sorted by length. Where there are so many of nearly one length that they fill many batches, these are
    sorted by audio among themselves, so that both paddings are small.
    """
    # The added [0, 1) breaks ties between equal lengths at random.
    keys = total * (1 + LENGTH_JITTER * random.uniform(-1, 1, len(total))) + random.random(len(total))
    if np.array_equal(audio, total):
        return np.argsort(keys, kind="stable")
    strata = _strata(int(keys.max()))[keys.astype(np.int64)]
    is_thick = (np.bincount(strata, weights=total) >= STRATUM_BATCHES * budget)[strata]
    by_audio = audio * (1 + LENGTH_JITTER * random.uniform(-1, 1, len(audio))) + random.random(len(audio))
    within = np.where(is_thick, by_audio / (by_audio.max() + 1), keys / (keys.max() + 1))  # in [0, 1)
    return np.argsort(strata + within, kind="stable")


def _strata(longest: int) -> np.ndarray:
    """The stratum of each length up to `longest`, [length]. Without a logarithm, which processors round differently."""
    edges = [1.0]
    while edges[-1] <= longest:
        edges.append(edges[-1] * (1 + STRATUM_WIDTH))
    return np.searchsorted(edges, np.arange(longest + 1), side="right")


class _Cutter:
    """Greedy cuts of items in a given order, each as long as the limits allow."""

    def __init__(self, audio: np.ndarray, text: np.ndarray, limits: Limits) -> None:
        self._audio, self._text, self._total = audio, text, audio + text
        self._sums = np.concatenate([[0], self._total.cumsum()])
        self._limits = limits

    def even_ends(self) -> np.ndarray:
        """As few cuts as the limits allow, the last ones evenly filled: no small left-over batch with a noisy gradient.

        Returns: where each batch ends, [batch].
        """
        ends = self._cut(0, 1.0)
        assert ends is not None  # each item fits on its own
        first = max(0, len(ends) - EVEN_BATCHES)
        begin, last = ends[first - 1] if first else 0, ends[first:]
        low, high = 0.0, 1.0
        while high - low > 0.01:
            middle = (low + high) / 2
            fewer = self._cut(begin, middle, len(last))
            if fewer is not None:
                last, high = fewer, middle
            else:
                low = middle
        return np.array(ends[:first] + last)

    def _cut(self, begin: int, share: float, most: int | None = None) -> list[int] | None:
        """Ends of the cuts from an item on under a share of the limits; None if it takes more cuts, or cannot be."""
        ends: list[int] = []
        start, window = begin, 16
        while start < len(self._total):
            while True:
                fits = self._num_fitting(start, start + window, share)
                if fits < window or start + window >= len(self._total):
                    break
                window *= 2
            start += fits
            ends.append(start)
            if fits == 0 or (most is not None and len(ends) > most):
                return None
            window = max(16, fits + fits // 4)
        return ends

    def _num_fitting(self, start: int, stop: int, share: float) -> int:
        """How many items from `start` on fit into one batch; looks no further than `stop`."""
        limits, total = self._limits, self._total[start:stop]
        counts = np.arange(1, len(total) + 1)
        if limits.mode == "padded":
            cost = np.maximum.accumulate(total) * counts
        else:
            cost = self._sums[start + 1 : start + 1 + len(total)] - self._sums[start]
        fits = int(np.searchsorted(cost, share * limits.max_batch_tokens, side="right"))  # cost only grows
        if fits and limits.memory is not None and limits.max_batch_bytes is not None:
            audio = np.maximum.accumulate(self._audio[start : start + fits])
            text = np.maximum.accumulate(self._text[start : start + fits])
            needed = limits.memory.predict(counts[:fits], audio, text)
            fits = int(np.searchsorted(needed, share * limits.max_batch_bytes, side="right"))
        return fits


def _halve_too_large(audio: np.ndarray, text: np.ndarray, ends: np.ndarray, limits: Limits) -> np.ndarray:
    """The ends of batches of which those that take too much memory are halved until they do not."""
    while limits.memory is not None and limits.max_batch_bytes is not None:
        starts = np.concatenate([[0], ends[:-1]])
        longest = np.maximum.reduceat(audio, starts), np.maximum.reduceat(text, starts)
        too_large = limits.memory.predict(ends - starts, *longest) > limits.max_batch_bytes
        if not too_large.any():
            break
        ends = np.sort(np.concatenate([ends, (starts + ends)[too_large] // 2]))
    return ends


def _shuffled(items: np.ndarray, ends: np.ndarray, random: np.random.Generator) -> Batches:
    """The batches in random order."""
    sizes = np.diff(ends, prepend=0)
    order = random.permutation(len(sizes))
    new_sizes = sizes[order]
    new_ends = new_sizes.cumsum()
    shift = (ends - sizes)[order] - (new_ends - new_sizes)  # from where an item stands to where it stood
    return Batches(items[np.arange(len(items)) + np.repeat(shift, new_sizes)], new_ends)
