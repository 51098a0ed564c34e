"""Examples of all lengths into sequences of one length, so that next to nothing is left empty.

The long ones are dealt out, each round to the emptiest sequence first (Graham, "Bounds on multiprocessing timing
anomalies", 1969), so that each sequence gets a like mix of lengths. The short ones then fill the gaps by best fit: the
longest first, each into the smallest gap that takes it (Johnson, "Fast algorithms for bin packing", 1974).
"""

import numpy as np

#: Share of the tokens, in the shortest examples, that is kept back to fill gaps with.
FILLING_SHARE = 0.1
#: Lengths are dealt out after a random stretch of up to this share, so that each epoch mixes anew.
JITTER = 0.1
#: How often it begins again with more sequences, so that all are filled alike, before what is left gets its own.
MOST_TRIALS = 4


def pack(lengths: np.ndarray, capacity: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sort items into as few sequences as this finds.

    Args:
        lengths: tokens of each item, [item], 1 to `capacity`.
        capacity: tokens of a sequence.
        random: breaks ties, and mixes.

    Returns: the items, sequence by sequence, [item], and where each sequence ends, [sequence].
    """
    keys = lengths * (1 + JITTER * random.uniform(-1, 1, len(lengths)))
    order = np.argsort(-keys, kind="stable")
    ordered = lengths[order]
    num_bins = -(-int(lengths.sum()) // capacity)
    for _ in range(MOST_TRIALS):
        bins = _place(ordered, capacity, num_bins, random)
        missing = -(-int(ordered[bins < 0].sum()) // capacity)
        if not missing:
            break
        num_bins += missing
    by_bin = np.argsort(bins + random.random(len(order)), kind="stable")[np.count_nonzero(bins < 0) :]
    sizes = np.bincount(bins[bins >= 0])
    items, ends = order[by_bin], sizes[sizes > 0].cumsum()
    if missing:
        others = order[bins < 0]
        ends = np.concatenate([ends, len(items) + next_fit(lengths[others], capacity)])
        items = np.concatenate([items, others])
    return items, ends


def next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Where sequences end that take items as they come, [sequence]."""
    sums = lengths.cumsum()
    ends: list[int] = []
    done = 0
    while not ends or ends[-1] < len(lengths):
        ends.append(int(np.searchsorted(sums, done + capacity, side="right")))
        done = int(sums[ends[-1] - 1])
    return np.array(ends)


def _place(lengths: np.ndarray, capacity: int, num_bins: int, random: np.random.Generator) -> np.ndarray:
    """The sequence of each item, [item], lengths nearly falling; −1 where it found no place."""
    gaps = np.full(num_bins, capacity)
    bins = np.full(len(lengths), -1)
    num_dealt = int(np.searchsorted(lengths.cumsum(), (1 - FILLING_SHARE) * lengths.sum(), side="right"))
    for start in range(0, num_dealt, num_bins):
        dealt = lengths[start : min(start + num_bins, num_dealt)]
        mixed = random.permutation(num_bins)
        emptiest = mixed[np.argsort(-gaps[mixed], kind="stable")[: len(dealt)]]
        fits = dealt <= gaps[emptiest]
        gaps[emptiest[fits]] -= dealt[fits]
        bins[start : start + len(dealt)][fits] = emptiest[fits]
    _fill(lengths, gaps, bins)
    return bins


def _fill(lengths: np.ndarray, gaps: np.ndarray, bins: np.ndarray) -> None:
    """Best fit of the items without a sequence, the longest first, into `bins`, [item]."""
    left = np.flatnonzero(bins < 0)
    if not len(left):
        return
    left = left[np.argsort(-lengths[left], kind="stable")]
    starts = np.flatnonzero(np.diff(lengths[left], prepend=0))
    by_gap = np.argsort(gaps, kind="stable")
    by_gap = by_gap[gaps[by_gap] >= lengths[left[-1]]]
    sorted_gaps = gaps[by_gap]
    for start, stop in zip(starts, [*starts[1:], len(left)], strict=True):
        length, items = int(lengths[left[start]]), left[start:stop]
        while len(items):
            first = int(np.searchsorted(sorted_gaps, length))
            last = min(first + len(items), len(by_gap))
            if first == last:
                break
            bins[items[: last - first]] = by_gap[first:last]
            sorted_gaps[first:last] -= length
            order = np.argsort(sorted_gaps, kind="stable")  # three sorted runs, which it merges
            by_gap, sorted_gaps = by_gap[order], sorted_gaps[order]
            items = items[last - first :]
