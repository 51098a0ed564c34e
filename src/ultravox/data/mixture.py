"""What one epoch is made of: which rows of which source come, how often, and in which order.

Each source is an endless round through its rows. An epoch takes the next so many rows of each round: after any number
of epochs, two rows of one source have come equally often, or one of them once more. What stands at a place of an epoch
is computed from the place alone (see `permutation`), so a corpus of 100 million rows needs no list of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ultravox.data.permutation import Permutation
from ultravox.errors import ConfigError, DataError

_ROUND, _EPOCH = 1, 2  # what a permutation is for, in its seed


@dataclass(frozen=True, slots=True)
class Draws:
    """What stands at some places of an epoch."""

    rows: np.ndarray
    """[place], over all sources: the rows of a source follow those of the sources before it."""
    copies: np.ndarray
    """How often the row came before, over all epochs, [place]."""


class Mixture:
    """The rows of every epoch, as a pure function of the arguments."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        repeats: Mapping[str, float] | None = None,
        weights: Mapping[str, float] | None = None,
        temperature: float | None = None,
        seed: int,
    ) -> None:
        """At most one of `repeats`, `weights` and `temperature`; without any, each row comes once in an epoch.

        Args:
            sizes: rows of each source, by its name.
            repeats: how often each row of a source comes in an epoch; 0.5 = half the rows in one epoch, the other
                half in the next.
            weights: shares of the sources among the examples of an epoch; they need not sum to 1. An epoch is as long
                as it takes to see every source entirely: E = max over sources of size / share. The source that sets
                this maximum comes once, the others once or more.
            temperature: weights = sizes ** (1 / temperature).
            seed: of the run.

        Raises:
            DataError: a source without rows, or nothing at all.
            ConfigError: a repeat, weight or temperature that is no number above 0, is missing, or names no source.
        """
        if not sizes:
            raise DataError("no examples to train on: there are no sources; check data.sources and the length limits")
        for name, size in sizes.items():
            if size < 1:
                raise DataError(f"source {name!r} has no rows that can be used: leave it out, or check its filters")
        if sum(given is not None for given in (repeats, weights, temperature)) > 1:
            raise ConfigError("a mixture has repeats, weights or a temperature: choose one way")
        self.names, self.sizes = list(sizes), list(sizes.values())
        if temperature is not None:
            _require_positive("the temperature", temperature)
            largest = max(sizes.values())
            weights = {name: math.exp(math.log(size / largest) / temperature) for name, size in sizes.items()}
        if weights is not None:
            self.passes = _passes_of_weights(sizes, _complete("weight", weights, sizes))
        else:
            given = _complete("repeat", repeats, sizes) if repeats is not None else dict.fromkeys(sizes, 1.0)
            self.passes = [Fraction(given[name]).limit_denominator(10**9) for name in sizes]
        """How often each row of a source comes in an epoch, on average."""
        per_epoch = [size * passes for size, passes in zip(self.sizes, self.passes, strict=True)]
        if sum(map(math.floor, per_epoch)) < 1:
            raise DataError(f"an epoch would hold no example: source {self.names[0]!r} has too few rows for its repeat")
        total = sum(per_epoch)
        self.requested = {name: float(count / total) for name, count in zip(self.names, per_epoch, strict=True)}
        """Share of each source among the examples of an epoch."""
        self._starts = np.cumsum([0, *self.sizes])
        self._seed = seed
        self._rounds = [Permutation(size, [seed, _ROUND, index]) for index, size in enumerate(self.sizes)]

    @property
    def num_rows(self) -> int:
        """Rows of all sources."""
        return int(self._starts[-1])

    def drawn_before(self, epoch: int) -> list[int]:
        """How many rows of each source came in all epochs before this one."""
        return [math.floor(epoch * size * passes) for size, passes in zip(self.sizes, self.passes, strict=True)]

    def counts(self, epoch: int) -> list[int]:
        """How many examples of each source are in an epoch."""
        pairs = zip(self.drawn_before(epoch), self.drawn_before(epoch + 1), strict=True)
        return [end - begin for begin, end in pairs]

    def num_places(self, epoch: int) -> int:
        """Examples in an epoch."""
        return sum(self.counts(epoch))

    def realised(self, epoch: int) -> dict[str, float]:
        """Share of each source in an epoch, to be held against `requested`."""
        counts = self.counts(epoch)
        return {name: count / sum(counts) for name, count in zip(self.names, counts, strict=True)}

    def draw(self, epoch: int, start: int, stop: int) -> Draws:
        """What stands at the places start … stop − 1 of an epoch. Takes time and memory for these places alone.

        Raises:
            ValueError: places outside of the epoch.
        """
        num_places = self.num_places(epoch)
        if not 0 <= start <= stop <= num_places:
            raise ValueError(f"places {start} to {stop} of an epoch of {num_places}")
        items = Permutation(num_places, [self._seed, _EPOCH, epoch])(np.arange(start, stop))
        ends = np.cumsum(self.counts(epoch))
        sources = np.searchsorted(ends, items, side="right") if len(ends) > 1 else np.zeros(len(items), dtype=np.int64)
        begins = np.array(self.drawn_before(epoch)) - np.concatenate([[0], ends[:-1]])
        turns = items + begins[sources]  # place in the source's endless round
        sizes = np.array(self.sizes)[sources]
        copies = turns // sizes
        rows = turns - copies * sizes
        for index, passes in enumerate(self.passes):
            if passes.denominator > 1:  # whole rounds need no order of their own: the epoch's is random already
                mine = np.flatnonzero(sources == index)
                rows[mine] = self._rounds[index](rows[mine])
        return Draws(rows + self._starts[sources], copies)

    def row_counts(self, epoch: int) -> np.ndarray:
        """How often each row comes in an epoch, [row]. Takes memory for all rows: for an audit, not for training."""
        found = []
        for index, (begin, end) in enumerate(zip(self.drawn_before(epoch), self.drawn_before(epoch + 1), strict=True)):
            whole, rest = divmod(end - begin, self.sizes[index])
            counts = np.full(self.sizes[index], whole)
            counts[self._rounds[index](np.arange(begin, begin + rest) % self.sizes[index])] += 1
            found.append(counts)
        return np.concatenate(found)


def _passes_of_weights(sizes: Mapping[str, int], weights: Mapping[str, float]) -> list[Fraction]:
    """Passes over each source in an epoch, in which the scarcest comes once."""
    passes = {name: weights[name] / size for name, size in sizes.items()}
    scarcest = min(passes.values())
    # A denominator of at most 10^9 takes rounding errors out: what should be 1 is 1.
    return [Fraction(passes[name] / scarcest).limit_denominator(10**9) for name in sizes]


def _require_positive(what: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{what} is {value:g}, expected a number above 0")


def _complete(what: str, given: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """What was given for each source, once it is sure that it was given for each, and for no other."""
    for name in sizes:
        if name not in given:
            raise ConfigError(f"source {name!r} has no {what}: give all sources one, or none")
        _require_positive(f"the {what} of source {name!r}", given[name])
    if odd := sorted(set(given) - set(sizes)):
        raise ConfigError(f"a {what} is given for {odd[0]!r}, which is no source: the sources are {', '.join(sizes)}")
    return {name: given[name] for name in sizes}
