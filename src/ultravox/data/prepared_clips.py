"""The clips of a prepared split, read from its shards when they are asked for: a corpus need not fit into memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from ultravox.data.clip import Clip
from ultravox.data.prepared import placed_clips, read_group, read_index, shard_paths

#: Row groups whose texts are kept, so that neighbours are read together.
KEPT_GROUPS = 64
#: From this share of a shard's rows on, reading all of it is faster than reading row groups.
SEQUENTIAL_SHARE = 0.1


def pick(clips: Sequence[Clip], numbers: np.ndarray) -> Iterator[Clip]:
    """The clips of some numbers, ascending, in the way that is fastest for them."""
    return clips.pick(numbers) if isinstance(clips, PreparedClips) else (clips[number] for number in numbers.tolist())


class PreparedClips(Sequence[Clip]):
    """Some rows of a split, 12 bytes each. One that is asked for is read with the others of its row group."""

    def __init__(self, folder: str | Path, split: str, rows: np.ndarray | None = None) -> None:
        """Args:
        folder: of `ultravox data prepare`.
        split: of it.
        rows: numbers of the rows in the split, [clip]; None = all of them.

        Raises:
            DataError: no such split, or a shard that is missing or cut off.
        """
        self._paths = list(shard_paths(folder, split))
        index = read_index(folder, split)
        chosen = slice(None) if rows is None else rows
        places = (index.shards, index.row_groups, index.rows)
        self._shards, self._groups, self._rows = (np.array(place[chosen], dtype=np.int32) for place in places)
        self._kept: dict[int, tuple[tuple[int, int], list[Clip]]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, number: int) -> Clip: ...
    @overload
    def __getitem__(self, number: slice) -> list[Clip]: ...
    def __getitem__(self, number: int | slice) -> Clip | list[Clip]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        return self._group(int(self._shards[number]), int(self._groups[number]))[int(self._rows[number])]

    def __iter__(self) -> Iterator[Clip]:
        return self.pick(range(len(self)))

    def pick(self, numbers: Sequence[int] | np.ndarray) -> Iterator[Clip]:
        """The clips of some numbers, ascending. A shard of which much is wanted is read from end to end: faster."""
        numbers = np.asarray(numbers, dtype=np.int64)
        for shard in np.unique(self._shards[numbers]).tolist() if len(numbers) else ():
            mine = numbers[self._shards[numbers] == shard]
            if len(mine) < SEQUENTIAL_SHARE * int((self._shards == shard).sum()):
                yield from (self[number] for number in mine.tolist())
                continue
            wanted = zip(self._groups[mine].tolist(), self._rows[mine].tolist(), strict=True)
            place = next(wanted)
            for group, row, clip in placed_clips(self._paths[shard]):
                if (group, row) == place:
                    yield clip
                    if (place := next(wanted, (-1, -1))) == (-1, -1):
                        break

    def _group(self, shard: int, group: int) -> list[Clip]:
        """The clips of a row group. A place for each of the last few: nothing to lock, nothing to grow."""
        place = (shard * 31 + group) % KEPT_GROUPS
        found = self._kept.get(place)
        if found is None or found[0] != (shard, group):
            found = self._kept[place] = ((shard, group), read_group(self._paths[shard], group))
        return found[1]
