"""An endless stream of clips from a dataset that is never there as a whole: shard by shard, a window at a time.

The order is a pure function of the seed: in each epoch the shards are shuffled, and dealt out to the ranks like cards,
so that each row comes once, to one rank. This is the one split that there is: ``split_dataset_by_node`` deals out the
shards once and for all, and a shuffle after it would be of a part. Nothing is shuffled in a buffer: ``datasets`` loses
what lies in one on resuming. Within a window, whoever plans the batches mixes the rows.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ultravox.data.clip import Clip, RowFault
from ultravox.data.huggingface import HuggingFaceSource
from ultravox.data.quarantine import ID_TWICE, Quarantine
from ultravox.data.source import ShardedSource, SourceSpec
from ultravox.data.sources import open_source, usable_reason
from ultravox.errors import CheckpointError, DataError

STATE_VERSION = 1
#: What a place depends on, as a configuration calls it.
IN_WORDS = {
    "version": "format version",
    "world_size": "number of processes",
    "window": "data.stream_window",
    "fingerprint": "rows or options",
}
ROWS_TO_JUDGE = 1000  # of fewer rows, one bad one may be more than its share: it is judged as if the others were good


@dataclass(frozen=True, slots=True)
class Window:
    """What comes at once."""

    clips: list[Clip]
    epoch: int
    """Of several streams, of the one that has come least often."""
    share: tuple[float, float]
    """Of this process's shards in that epoch, those behind the window's beginning and behind its end; of one stream 0
    to 1."""
    left_out: list[tuple[str, str]]
    """Reason and id of the rows that gave no clip, since the window before."""
    num_rows: int
    """That were looked at, since the window before."""
    epochs: list[int]
    """Of each clip, the epoch of its stream."""
    streams: list[int]
    """Of each clip, the index of its stream among `Stream.shares`."""


class Stream(Protocol):
    """Windows without an end, of one stream or of several."""

    name: str
    window: int
    shares: dict[str, float]
    """Stream → its share among the examples."""

    def __iter__(self) -> Iterator[Window]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def rewind(self) -> None: ...
    def set_aside(self, left_out: Iterable[tuple[str, str]]) -> None: ...
    def settle(self, kept: Sequence[int]) -> None: ...


class StreamSource:
    """Windows of clips, epoch after epoch, for one rank. Iterating goes on where it is, without an end.

    ``state_dict()`` is the beginning of the window that was yielded last: from there, the same windows come again.
    """

    def __init__(
        self,
        spec: SourceSpec,
        *,
        window: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        max_quarantine_share: float = 0.01,
        key: str = "",
    ) -> None:
        """Args:
        spec: a Hugging Face dataset or a prepared folder, with `streaming`.
        window: clips in a window; the last of an epoch may have fewer.
        seed: of the order of the shards.
        rank, world_size: which part of the shards is this process's.
        max_quarantine_share: more faulty rows than this stop the stream.
        key: what it is called among others; empty = the name of its source.

        Raises:
            DataError: no such dataset, shards that cannot be dealt out evenly, or caps, which a stream has no use for.
        """
        if not spec.streaming:
            raise DataError(f"{spec.name} is not to be streamed: set streaming: true, or load it as a whole")
        if spec.max_clips is not None or spec.max_hours is not None:
            raise DataError(
                f"{spec.name}: a stream comes in another order in each epoch; leave out max_clips, max_hours"
            )
        source = open_source(spec)
        assert isinstance(source, ShardedSource)  # of these kinds alone a source opens with `streaming`
        self.source = source
        if isinstance(source, HuggingFaceSource):
            require_whole(source.stream, spec.name)
        self.spec, self.window, self.seed, self.name = spec, window, seed, spec.name
        self.shares = {key or spec.name: 1.0}
        self.rank, self.world_size = rank, world_size
        self.num_shards = self.source.num_shards
        if self.num_shards % world_size:
            raise DataError(
                f"{spec.name} has {self.num_shards} shards, which cannot be dealt out evenly to {world_size} "
                f"processes: write it in a multiple of {world_size} files, or use another number of processes"
            )
        self.max_quarantine_share = max_quarantine_share
        self.quarantine = Quarantine()
        self.num_rows = 0
        """Rows of the present epoch that were looked at, since its beginning or since resuming."""
        self.fingerprint = self.source.fingerprint()
        self._left_out: list[tuple[str, str]] = []
        self._rows_before = 0  # of num_rows, those of windows that were yielded
        self._place = (0, 0, 0)
        """Epoch, shard among those of this rank, row in it: where the next window begins."""
        self._current = self._place  # where the last one did

    def shards(self, epoch: int) -> list[int]:
        """The shards of this rank in one epoch, in order."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_shards)
        return [int(shard) for shard in order[self.rank :: self.world_size]]

    def __iter__(self) -> Iterator[Window]:
        """Windows without an end.

        Raises:
            DataError: an epoch has no clip that can be used, or too many that cannot; or this is a worker process.
        """
        _require_main_process(self.spec.name)
        while True:
            epoch = self._place[0]
            found_any = self._place != (epoch, 0, 0)
            for clips, following in self._epoch_windows(*self._place):
                found_any = True
                self._current, self._place = self._place, following
                yield self._window(clips)
            if not found_any:
                reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.quarantine.counts().items()))
                raise DataError(f"{self.spec.name}: no clip is left of {self.num_rows} ({reasons}): check its filters")
            self.quarantine.require(self.max_quarantine_share, self.num_rows)
            self._place = (epoch + 1, 0, 0)
            self._rows_before -= self.num_rows  # rows behind the last clip are told of with the next window
            self.quarantine, self.num_rows = Quarantine(), 0

    def _window(self, clips: list[Clip]) -> Window:
        """A window that ends at the present place."""
        (epoch, begin, _), (_, end, _) = self._current, self._place
        num_shards = self.num_shards // self.world_size
        left_out, self._left_out = self._left_out, []
        num_rows, self._rows_before = self.num_rows - self._rows_before, self.num_rows
        share = (begin / num_shards, end / num_shards)
        return Window(clips, epoch, share, left_out, num_rows, [epoch] * len(clips), [0] * len(clips))

    def _epoch_windows(self, epoch: int, turn: int, row: int) -> Iterator[tuple[list[Clip], tuple[int, int, int]]]:
        """The windows of the rest of an epoch, each with the place behind it."""
        clips: list[Clip] = []
        ids: set[str] = set()  # of this window: what came before it is not known after resuming
        shards = self.shards(epoch)
        for index in range(turn, len(shards)):
            start = row if index == turn else 0
            for number, (place, found) in enumerate(self.source.shard_rows(shards[index], start), start=start + 1):
                if clip := self._usable(found, place, ids):
                    clips.append(clip)
                    ids.add(clip.id)
                if len(clips) == self.window:
                    yield clips, (epoch, index, number)
                    clips, ids = [], set()
        if clips:
            yield clips, (epoch, len(shards), 0)

    def _usable(self, found: Clip | RowFault, place: str, ids: Collection[str]) -> Clip | None:
        """The clip of a row, or None and a note in the quarantine."""
        self.num_rows += 1
        if isinstance(found, Clip):
            reason = ID_TWICE if found.id in ids else usable_reason(found) or self.spec.filters.reason(found)
            if reason is None:
                return found
        else:
            reason = found.reason
        name = self.quarantine.add_row(reason, found.id if isinstance(found, Clip) else found.name, place)
        self._left_out.append((reason, name))
        self._judge()
        return None

    def set_aside(self, left_out: Iterable[tuple[str, str]]) -> None:
        """Take note of clips that turned out to be unusable: reasons and ids. DataError when too many are."""
        for reason, name in left_out:
            self.quarantine.add(reason, name)
        self._judge()

    def settle(self, kept: Sequence[int]) -> None:
        """How many clips of the last window became examples. One stream has no share to keep to."""

    @property
    def epochs(self) -> float:
        """How often it has come, by the shards behind the next window's beginning."""
        epoch, turn, _ = self._place
        return epoch + turn / (self.num_shards // self.world_size)

    def _judge(self) -> None:
        coming = max(0, ROWS_TO_JUDGE - self.num_rows)
        self.quarantine.require(self.max_quarantine_share, self.num_rows, coming=coming)

    def state_dict(self) -> dict[str, Any]:
        """Where the window begins that was yielded last; the very beginning before any was. JSON can hold it."""
        return self._state(self._current)

    def following(self) -> dict[str, Any]:
        """Like `state_dict`, where the next window begins."""
        return self._state(self._place)

    def _state(self, place: tuple[int, int, int]) -> dict[str, Any]:
        epoch, turn, row = place
        return {"version": STATE_VERSION, **self._identity(), "epoch": epoch, "shard": turn, "row": row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place that `state_dict` gave: the window that begins there comes next.

        Raises:
            CheckpointError: the state is of another stream: other data, options, seed, window or processes.
        """
        for key, now in {"version": STATE_VERSION, **self._identity()}.items():
            if state.get(key) != now:
                before = state.get(key)
                what = IN_WORDS.get(key, key)
                how = f"{before!r}, now it is {now!r}" if key != "fingerprint" else "other than now"
                raise CheckpointError(
                    f"the place in the stream {self.spec.name} was saved with {what} {how}: go on with what it was, or "
                    "begin a new run"
                )
        self._go_to((int(state["epoch"]), int(state["shard"]), int(state["row"])))

    def rewind(self) -> None:
        """Go to the beginning of the first epoch."""
        self._go_to((0, 0, 0))

    def _go_to(self, place: tuple[int, int, int]) -> None:
        self._place = self._current = place
        self.quarantine, self.num_rows = Quarantine(), 0
        self._left_out, self._rows_before = [], 0

    def _identity(self) -> dict[str, Any]:
        """What must be the same for the same rows to come again."""
        return {
            "world_size": self.world_size,
            "rank": self.rank,
            "seed": self.seed,
            "window": self.window,
            "fingerprint": self.fingerprint,
        }


def require_whole(stream: Any, name: str) -> None:
    """Raise a DataError for an ``IterableDataset`` that ``split_dataset_by_node`` has split: rows would be lost."""
    if getattr(stream, "_distributed", None) is not None:
        raise DataError(f"{name} is split among the processes already: a second split would lose rows; give it whole")


def _require_main_process(name: str) -> None:
    """In a worker process of a DataLoader, ``datasets`` would give each worker a part of each shard, without a word."""
    from torch.utils.data import get_worker_info

    if get_worker_info() is not None:
        raise DataError(f"{name} is streamed inside a worker process: iterate it in the main one, and send clips on")
