"""Which examples go into which batch: a pure function of the examples' lengths, a seed and the epoch.

So the place in the data order is two integers, an epoch and a batch index, and a resumed run needs nothing else.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ultravox.errors import DataError

#: Lengths are sorted after a random stretch of up to this share, so that each epoch mixes its batches anew.
LENGTH_JITTER = 0.02


def require_budget(longest: int, max_batch_tokens: int) -> None:
    """Raise a DataError when the longest example does not fit into a batch."""
    if longest > max_batch_tokens:
        raise DataError(
            f"the longest example has {longest} tokens, but max_batch_tokens is {max_batch_tokens}: "
            f"raise max_batch_tokens or lower data.max_audio_seconds"
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
    if len(lengths) == 0:
        raise DataError("no examples to plan batches from: check data.sources and the length limits")
    tokens = np.asarray(lengths, dtype=np.int64)
    if tokens.min() < 1:
        raise DataError(f"example {int(tokens.argmin())} has length {int(tokens.min())}: expected at least 1")
    longest = int(tokens.max())
    require_budget(longest, max_batch_tokens)
    random = np.random.default_rng([seed, epoch])
    # The added [0, 1) breaks ties between equal lengths at random.
    keys = tokens * (1 + LENGTH_JITTER * random.uniform(-1, 1, len(tokens))) + random.random(len(tokens))
    order = np.argsort(keys, kind="stable")
    cut = partial(_padded_cut if count_padding else _packed_cut, tokens[order])
    batches = [order[start:stop] for start, stop in _even_cut(cut, longest, max_batch_tokens)]
    return [batches[index] for index in random.permutation(len(batches))]


def _padded_cut(lengths: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Greedy cuts of [item] so that size × maximum stays within the budget."""
    cuts = []
    start, window = 0, 16
    while start < len(lengths):
        while True:
            chunk = lengths[start : start + window]
            cost = np.maximum.accumulate(chunk) * np.arange(1, len(chunk) + 1)
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
