"""Several streams as one: each window holds clips of all of them, in the proportion of their weights.

An endless stream has no total, so that a weight cannot be turned into repeats. Instead, clip by clip, that stream comes
next whose share is furthest behind: so no choice is random, and the shares are right at every place, up to rounding.
What counts are the clips that became examples: a stream of which many are left out is drawn from the more. Each stream
has its own epochs; a small one may come several times in a window.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from ultravox.data.quarantine import ID_TWICE, Quarantine
from ultravox.data.streaming import IN_WORDS, ROWS_TO_JUDGE, STATE_VERSION, StreamSource, Window
from ultravox.errors import CheckpointError, DataError


class StreamMixture:
    """Windows of clips of several streams, for one rank. Iterating goes on where it is, without an end.

    ``state_dict()`` is the beginning of the window that was yielded last: from there, the same windows come again.
    """

    def __init__(
        self,
        streams: Mapping[str, StreamSource],
        weights: Mapping[str, float] | None = None,
        *,
        window: int,
        max_quarantine_share: float = 0.01,
    ) -> None:
        """Args:
        streams: each by what it is called, in windows of one clip.
        weights: above 0, of each stream; they need not sum to 1. None = equal ones.
        window: clips in a window.
        max_quarantine_share: more clips than this that turn out to be unusable stop the stream.
        """
        if not streams or any(stream.window != 1 for stream in streams.values()):
            raise ValueError("a mixture takes one stream or more, each in windows of one clip")
        given = [Fraction(1 if weights is None else weights[key]).limit_denominator(10**9) for key in streams]
        if min(given) <= 0:
            raise ValueError(f"the weights {weights} must be above 0")
        whole = math.lcm(*(weight.denominator for weight in given))
        self._parts = [int(weight * whole) for weight in given]
        """The weights in whole numbers, in which nothing is ever rounded."""
        self.shares = {key: part / sum(self._parts) for key, part in zip(streams, self._parts, strict=True)}
        self.name, self.window = " + ".join(streams), window
        self._keys, self._streams = list(streams), list(streams.values())
        self._max_quarantine_share = max_quarantine_share
        self._used: list[int] = []
        """Clips of each stream, in the windows before, that became examples."""
        self._kept: list[int] = []  # the same in the window that was yielded last
        self._quarantine, self._num_rows = Quarantine(), 0
        self.rewind()

    def __iter__(self) -> Iterator[Window]:
        """Windows without an end, all of the same size but for clips whose ids come twice in them.

        Raises:
            DataError: a stream of which no clip can be used, or too many cannot; or this is a worker process.
        """
        windows = [iter(stream) for stream in self._streams]
        while True:
            self._require_some()
            self._current = self._state()
            begin = self._epochs()
            found = [(index, next(windows[index])) for index in self._turns()]
            num_rows = sum(one.num_rows for _, one in found)
            self._take_out_repeated(found)
            drawn = [index for index, one in found if one.clips]
            self._kept = [drawn.count(index) for index in range(len(self._streams))]
            self._num_rows += num_rows
            epoch = math.floor(begin)
            yield Window(
                clips=[clip for _, one in found for clip in one.clips],
                epoch=epoch,
                share=(begin - epoch, self._epochs() - epoch),
                left_out=[fault for _, one in found for fault in one.left_out],
                num_rows=num_rows,
                epochs=[one.epoch for _, one in found if one.clips],
                streams=drawn,
            )
            self._used = [used + kept for used, kept in zip(self._used, self._kept, strict=True)]

    def _turns(self) -> Iterator[int]:
        """Which stream each clip of the next window is of: the one whose share is furthest behind, or the first."""
        used, total = list(self._used), sum(self._parts)
        for place in range(sum(used) + 1, sum(used) + 1 + self.window):
            behind = [part * place - total * count for part, count in zip(self._parts, used, strict=True)]
            index = behind.index(max(behind))
            used[index] += 1
            yield index

    def _take_out_repeated(self, found: list[tuple[int, Window]]) -> None:
        """Set aside the clips of a window whose id came before in it, in the same epoch of their stream."""
        seen: set[tuple[int, int, str]] = set()
        for place, (index, one) in enumerate(found):
            key = (index, one.epoch, one.clips[0].id)
            if key in seen:
                fault = (ID_TWICE, f"{one.clips.pop().id} ({self._keys[index]}, clip {place} of its window)")
                one.left_out.append(fault)
                self._streams[index].set_aside([fault])
            seen.add(key)

    def _epochs(self) -> float:
        """How often the stream has come that has come least often."""
        return min(stream.epochs for stream in self._streams)

    def _require_some(self) -> None:
        """Raise a DataError for a stream that gives nothing: the others would wait for it for ever."""
        for key, stream, used in zip(self._keys, self._streams, self._used, strict=True):
            if not used and stream.epochs >= 2:
                raise DataError(
                    f"no clip of a whole epoch of {key} can be trained on: leave it out, or check its texts and lengths"
                )

    def settle(self, kept: Sequence[int]) -> None:
        """How many clips of the last window became examples, of each stream; all of them, where this is not called."""
        self._kept = list(kept)

    def set_aside(self, left_out: Iterable[tuple[str, str]]) -> None:
        """Take note of clips that turned out to be unusable: reasons and ids. DataError when too many are."""
        for reason, name in left_out:
            self._quarantine.add(reason, name)
        coming = 0 if self._epochs() >= 1 else max(0, ROWS_TO_JUDGE - self._num_rows)
        self._quarantine.require(self._max_quarantine_share, self._num_rows, coming=coming)

    def state_dict(self) -> dict[str, Any]:
        """Where the window begins that was yielded last; the very beginning before any was. JSON can hold it."""
        return self._current

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place that `state_dict` gave: the window that begins there comes next.

        Raises:
            CheckpointError: the state is of other streams: other data, weights, options, seed, window or processes.
        """
        for key, now in self._identity().items():
            if state.get(key) != now:
                what = IN_WORDS.get(key, key)
                raise CheckpointError(
                    f"the place in the streams was saved with {what} {state.get(key)!r}, now it is {now!r}: go on with "
                    "what it was, or begin a new run"
                )
        for key, stream in zip(self._keys, self._streams, strict=True):
            stream.load_state_dict(state["streams"][key])
        self._begin([int(used) for used in state["used"]])

    def rewind(self) -> None:
        """Go to the beginning of the first epoch of each stream."""
        for stream in self._streams:
            stream.rewind()
        self._begin([0] * len(self._streams))

    def _begin(self, used: list[int]) -> None:
        self._used, self._kept = used, [0] * len(used)
        self._quarantine, self._num_rows = Quarantine(), 0
        self._current = self._state()

    def _identity(self) -> dict[str, Any]:
        """What must be the same for the same rows to come again, beside what each stream asks for."""
        weights = dict(zip(self._keys, self._parts, strict=True))
        return {"version": STATE_VERSION, "window": self.window, "weights": weights}

    def _state(self) -> dict[str, Any]:
        """Where the next window begins."""
        streams = {key: stream.following() for key, stream in zip(self._keys, self._streams, strict=True)}
        return {**self._identity(), "used": list(self._used), "streams": streams}
