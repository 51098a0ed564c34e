"""Which examples go into which batch: a pure function of the examples' lengths, a seed and the epoch.

So the place in the data order is two integers, an epoch and a batch index, and a resumed run needs nothing else.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ultravox.errors import DataError

#: Lengths are sorted after a random stretch of up to this share, so that each epoch mixes its batches anew.
LENGTH_JITTER = 0.02


def plan_batches(
    lengths: np.ndarray | Sequence[int], max_batch_tokens: int, seed: int, epoch: int, *, count_padding: bool = True
) -> list[np.ndarray]:
    """Cut one epoch into batches of like length, in random order.

    Args:
        lengths: tokens of each example, [item], or [item, part] when an example has parts that are padded apart
            (audio and text): a batch then costs its size times the sum of each part's maximum.
        max_batch_tokens: budget of one batch.
        seed: of the run.
        epoch: counts from 0.
        count_padding: whether padding counts in the budget; what is packed has none.

    Returns: arrays of item indices; every item is in exactly one.

    Raises:
        DataError: an example is longer than the budget, or has no length.
    """
    if len(lengths) == 0:
        raise DataError("no examples to plan batches from: check data.sources and the length limits")
    parts = np.asarray(lengths, dtype=np.int64)
    parts = parts.reshape(len(parts), -1)
    total = parts.sum(axis=1)
    if total.min() < 1:
        raise DataError(f"example {int(total.argmin())} has length {int(total.min())}: expected at least 1")
    if total.max() > max_batch_tokens:
        raise DataError(
            f"the longest example has {int(total.max())} tokens, but max_batch_tokens is {max_batch_tokens}: "
            f"raise max_batch_tokens or lower data.max_audio_seconds"
        )
    random = np.random.default_rng([seed, epoch])
    # The added [0, 1) breaks ties between equal lengths at random.
    keys = total * (1 + LENGTH_JITTER * random.uniform(-1, 1, len(total))) + random.random(len(total))
    order = np.argsort(keys, kind="stable")
    cut = partial(_cut, parts[order]) if count_padding else partial(_packed_cut, total[order])
    batches = [order[start:stop] for start, stop in _even_cut(cut, int(total.max()), max_batch_tokens)]
    return [batches[index] for index in random.permutation(len(batches))]


def _cut(parts: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Greedy cuts of [item, part] so that size × Σ max(part) stays within the budget."""
    cuts = []
    start, window = 0, 16
    while start < len(parts):
        while True:
            chunk = parts[start : start + window]
            cost = np.maximum.accumulate(chunk, axis=0).sum(axis=1) * np.arange(1, len(chunk) + 1)
            fits = int(np.searchsorted(cost, budget, side="right"))  # cost only grows
            if fits < len(chunk) or len(chunk) < window:
                break
            window *= 2
        cuts.append((start, start + fits))
        start += fits
        window = max(16, fits + fits // 4)
    return cuts


def _packed_cut(lengths: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Greedy cuts of [item] so that the sum of lengths stays within the budget."""
    ends = lengths.cumsum()
    cuts, start, done = [], 0, 0
    while start < len(lengths):
        stop = int(np.searchsorted(ends, done + budget, side="right"))
        cuts.append((start, stop))
        start, done = stop, int(ends[stop - 1])
    return cuts


def _even_cut(cut: Callable[[int], list[tuple[int, int]]], longest: int, budget: int) -> list[tuple[int, int]]:
    """As few cuts as the budget allows, evenly filled: no small left-over batch with a noisy gradient."""
    cuts = cut(budget)
    low, high = longest, budget
    while high - low > max(1, budget // 100):
        middle = (low + high) // 2
        fewer = cut(middle)
        if len(fewer) == len(cuts):
            cuts, high = fewer, middle
        else:
            low = middle
    return cuts


def padding_share(lengths: np.ndarray | Sequence[int], batches: Sequence[np.ndarray]) -> float:
    """The share of the batches' positions that is padding, 0 to 1."""
    parts = np.asarray(lengths, dtype=np.int64)
    parts = parts.reshape(len(parts), -1)
    padded = sum(len(batch) * int(parts[batch].max(axis=0).sum()) for batch in batches)
    real = sum(int(parts[batch].sum()) for batch in batches)
    return 1 - real / padded
