"""The order of a stream: each of its windows is planned when it comes, and its batches bring their examples along.

A stream is read once, from one end. So windows are asked for one behind the other, and to go on in the middle of a run
takes the stream's own place beside the position: where the position's window begins in it. All windows count as of one
epoch, for how many there are in one is not known; `epochs` tells of the stream's own. It may be a mixture of several.
"""

import hashlib
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ultravox.data.order import FORMAT_VERSION, Chosen, PlannedBatch, Position, Turns, random_numbers
from ultravox.data.plan import Batches, Limits, plan
from ultravox.data.streaming import Stream, Window
from ultravox.errors import DataError

#: Batches whose windows' places are remembered. A loader is never so many ahead: 64, 256 × 64 in workers, a step.
KEPT_BATCHES = 1 << 15
TOO_MANY_TOKENS = "longer than max_batch_tokens"
_STREAM = 4  # what a plan is for, in its seed


class Examples(NamedTuple):
    """What the clips of a window have become."""

    examples: Sequence[Any]
    """Each has an `id` and a `uid`."""
    audio_tokens: np.ndarray
    """Of each version, int [example, version]; 0 = that version does not exist."""
    text_tokens: np.ndarray
    """Under each prompt, int [example, prompt]; 0 = that prompt does not exist."""
    left_out: list[tuple[str, str]]
    """Reason and id of the clips that became none."""
    clips: np.ndarray
    """Which of the window's clips each is, int [example]."""


@dataclass(frozen=True, slots=True)
class StreamedBatch(PlannedBatch):
    """A batch with its examples; `rows` are places among them, and `copies` the epochs of their streams."""

    examples: Sequence[Any]
    epoch: int
    """Of the stream; of several, of the one that has come least often."""
    left_out: list[tuple[str, str]]
    """Reason and id of the rows that gave no example. The first batch of a window tells of all."""
    num_rows: int
    """Rows that were looked at for the window; told by its first batch, 0 in the others."""


class _Place(NamedTuple):
    """A window that was planned, when its examples may be gone."""

    state: dict[str, Any]
    """Of the stream, at the beginning of the window."""
    begin: float
    """In epochs."""
    end: float
    counts: np.ndarray
    """Examples of each stream in the window's batches before each, and in all of them, int [batch + 1, stream]."""

    @property
    def num_batches(self) -> int:
        return len(self.counts) - 1


@dataclass(frozen=True, slots=True)
class _Planned:
    examples: Sequence[Any]
    chosen: Chosen
    batches: Batches
    copies: np.ndarray
    epoch: int
    left_out: list[tuple[str, str]]
    num_rows: int


class StreamOrder:
    """The batches of a stream, as a function of the stream, its place and the seed.

    Each row comes once in an epoch, in the next of its versions and under the next of its prompts.
    """

    def __init__(
        self, source: Stream, read: Callable[[Window], Examples], limits: Limits, *, seed: int, fingerprint: str
    ) -> None:
        """Args:
        source: is rewound to its beginning.
        read: clips → examples and their lengths.
        limits: of a batch.
        seed: of the run.
        fingerprint: of the source and of what `read` makes of it.
        """
        self.source, self._read, self._limits, self._seed = source, read, limits, seed
        self._turns = Turns(seed)
        facts = repr([FORMAT_VERSION, fingerprint, seed, source.window, source.shares, limits]).encode()
        self.fingerprint = hashlib.sha256(facts + random_numbers(seed)).hexdigest()
        """Hex SHA-256 of all that decides the order, as far as it is known before the stream is read."""
        source.rewind()
        self._windows: Iterator[Window] = iter(source)
        self._number = -1
        self._present: _Planned | None = None
        self._places: dict[int, _Place] = {}
        self._kept: deque[int] = deque()  # windows in `_places`
        self._num_kept = 0  # batches in them

    def num_windows(self, epoch: int) -> int:
        """Without an end."""
        return sys.maxsize

    def num_batches(self, epoch: int, window: int) -> int:
        """Batches in a window, at least one: the one at hand, or the next, which is read then.

        Raises:
            DataError: too many rows that cannot be used, or none that can.
            ValueError: another window; a stream cannot go back.
        """
        return len(self._window(window).batches)

    def batch(self, epoch: int, window: int, index: int) -> StreamedBatch:
        """One batch of the window at hand or of the next. IndexError when it has no such batch."""
        found = self._window(window)
        items = found.batches[index]
        return StreamedBatch(
            np.arange(len(items)),
            found.chosen.versions[items],
            found.chosen.prompts[items],
            found.copies[items],
            [found.examples[item] for item in items],
            found.epoch,
            found.left_out if index == 0 else [],
            found.num_rows if index == 0 else 0,
        )

    def epochs(self, position: Position) -> float:
        """How often the stream has come up to a position that was planned, by the shards behind it."""
        place = self._places[position.window]
        return place.begin + (place.end - place.begin) * position.batch / place.num_batches

    def mixture(self, position: Position) -> dict[str, dict[str, float]]:
        """Of each stream, the share of the examples that was asked for, and what it is up to a planned position."""
        shares, place = self.source.shares, self._places[position.window]
        counts = np.array(place.state.get("used", [0] * len(shares))) + place.counts[position.batch]
        total = max(1, int(counts.sum()))
        realised = [float(count / total) for count in counts] if len(shares) > 1 else [1.0]
        pairs = zip(shares.items(), realised, strict=True)
        return {name: {"requested": share, "realised": found} for (name, share), found in pairs}

    def state(self, position: Position) -> dict[str, Any]:
        """For `go_to`: where the window of a position begins in the stream. JSON can hold it.

        It may be asked for while another thread has gone ahead.
        """
        return self._places[position.window].state

    def go_to(self, position: Position, state: dict[str, Any]) -> None:
        """Let a position's window come next. CheckpointError when the state is of another stream."""
        self.source.load_state_dict(state)
        self._windows, self._number, self._present = iter(self.source), position.window - 1, None
        self._places, self._kept, self._num_kept = {}, deque(), 0

    def _window(self, number: int) -> _Planned:
        if number == self._number + 1:
            self._present = None  # its memory is needed for the next one
            self._present = self._next(number)
            self._number = number
        if self._present is None or number != self._number:
            raise ValueError(f"window {number} of a stream that is at window {self._number}")
        return self._present

    def _next(self, number: int) -> _Planned:
        """Read on until there is something to plan."""
        left_out: list[tuple[str, str]] = []
        num_rows, first, state = 0, None, {}
        while True:
            window = next(self._windows)
            if first is None:
                first, state = window, self.source.state_dict()
            found = self._within_limits(self._read(window))
            self.source.set_aside(found.left_out)
            streams = np.array(window.streams, dtype=np.int64)[found.clips]
            self.source.settle(np.bincount(streams, minlength=len(self.source.shares)).tolist())
            left_out += window.left_out + found.left_out
            num_rows += window.num_rows
            if found.examples:
                break
            if window.epoch > first.epoch + 1:
                reasons = Counter(reason for reason, _ in left_out).most_common()
                named = ", ".join(f"{count} {reason}" for reason, count in reasons)
                raise DataError(f"{self.source.name}: no clip of a whole epoch can be trained on ({named})")
        names = np.array([int(example.uid[:8], 16) for example in found.examples], dtype=np.uint32)
        copies = np.array(window.epochs, dtype=np.int64)[found.clips]
        chosen = self._turns.choose(found.audio_tokens, found.text_tokens, names, copies)
        batches = plan(chosen.audio_tokens, chosen.text_tokens, self._limits, [self._seed, _STREAM, number])
        begin, end = first.epoch + first.share[0], window.epoch + window.share[1]
        self._remember(number, _Place(state, begin, end, self._counts(streams, batches)))
        return _Planned(found.examples, chosen, batches, copies, window.epoch, left_out, num_rows)

    def _counts(self, streams: np.ndarray, batches: Batches) -> np.ndarray:
        """See `_Place`."""
        num = len(self.source.shares)
        found = [np.bincount(streams[batches[index]], minlength=num) for index in range(len(batches))]
        return np.cumsum([np.zeros(num, dtype=np.int64), *found], axis=0)

    def _remember(self, number: int, place: _Place) -> None:
        """Keep a window's place, and forget those that no loader is behind any more."""
        self._places[number] = place
        self._kept.append(number)
        self._num_kept += place.num_batches
        while self._num_kept - (oldest := self._places[self._kept[0]].num_batches) >= KEPT_BATCHES:
            self._num_kept -= oldest
            del self._places[self._kept.popleft()]

    def _within_limits(self, found: Examples) -> Examples:
        """Without the examples that no batch can take: after days, one of them should not end a run."""
        longest = found.audio_tokens.max(axis=1, initial=0) + found.text_tokens.max(axis=1, initial=0)
        fits = longest <= self._limits.max_batch_tokens
        if fits.all():
            return found
        kept, gone = ([found.examples[i] for i in np.flatnonzero(which).tolist()] for which in (fits, ~fits))
        left_out = found.left_out + [(TOO_MANY_TOKENS, example.id) for example in gone]
        return Examples(kept, found.audio_tokens[fits], found.text_tokens[fits], left_out, found.clips[fits])
