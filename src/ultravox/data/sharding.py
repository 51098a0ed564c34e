"""Which rows go into which shard: decided by a first pass over the clips, before any audio is read.

A split is cut into consecutive shards of about equally many bytes, estimated from the rows' durations, so that the cut
is the same whoever builds the shards. The number of shards is the least multiple of what the user asks for that keeps
each below the size limit.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ultravox.audio.content import NO_AUDIO, Audio
from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.audio.segment import AudioSegment
from ultravox.data.clip import Clip, RowFault
from ultravox.data.first_seen import FirstSeen
from ultravox.data.quarantine import ID_TWICE
from ultravox.data.shard import LeftOut, RowOptions, ShardReport, ShardTask, finished_shard
from ultravox.errors import AudioError, DataError

BYTES_PER_SECOND = 2 * SAMPLE_RATE  # FLAC is never longer than the samples themselves, but for its headers
MIN_ROW_BYTES = 16 << 10  # a row counts for at least so much, so that a shard's list of rows is never long

Rows = Callable[[], Iterable[Clip | RowFault]]
"""Gives the same clips, and the rows that give none, in the same order each time that it is called."""
CountTokens = Callable[[list[str]], list[int]]
"""Texts to how many tokens each has."""


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """What decides the result, apart from the clips."""

    rows: RowOptions = field(default_factory=RowOptions)
    shards_multiple_of: int = 8
    """The shards of a split are a multiple of this: of processes × data workers of the training to come."""
    max_shard_mb: int = 512
    tokenizer: str | None = None
    """Name of what counts the tokens."""


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """What the first pass finds in a split."""

    name: str
    rows: Rows
    num_rows: int
    num_bytes: int
    """Estimated, of all rows."""
    num_shards: int
    fingerprint: str
    """Hex SHA-256 of the rows but for their audio."""
    repeated: dict[int, str]
    """Number of each row whose id came before → the number of the row where it came."""


def plan_split(name: str, rows: Rows, options: PrepareOptions) -> SplitPlan:
    """Read the rows once. DataError when there are none, or one is too big for a shard."""
    digest, num_bytes, largest, number = hashlib.sha256(), 0, 0, -1
    repeated: dict[int, str] = {}
    with closing(FirstSeen()) as seen:
        for number, row in enumerate(rows()):
            digest.update(_row_text(row))
            size = row_bytes(row, options.rows)
            num_bytes, largest = num_bytes + size, max(largest, size)
            if isinstance(row, Clip) and (before := seen.first(row.id, str(number))) is not None:
                repeated[number] = before
    if number < 0:
        raise DataError(f"split {name!r} holds no rows: there is nothing to prepare")
    room = (options.max_shard_mb << 20) - largest
    if room <= 0:
        raise DataError(
            f"a row of split {name!r} may take {largest / 2**20:.1f} MB, and a shard is to have at most "
            f"{options.max_shard_mb} MB: raise --max-shard-mb"
        )
    multiple = options.shards_multiple_of
    num_shards = math.ceil(num_bytes / room / multiple) * multiple
    return SplitPlan(name, rows, number + 1, num_bytes, num_shards, digest.hexdigest(), repeated)


def shard_file(split: str, number: int, num_shards: int) -> str:
    """Where a shard lies: the names by which Hugging Face `datasets` knows shards and their split."""
    return f"data/{split}-{number:05d}-of-{num_shards:05d}.parquet"


def report_file(split: str, number: int) -> str:
    """Where a shard's report lies until the dataset is whole."""
    return f"work/{split}-{number:05d}.json"


def make_tasks(
    plan: SplitPlan, folder: Path, options: PrepareOptions, context: str, count_tokens: CountTokens | None
) -> Iterator[ShardTask | ShardReport]:
    """Read the clips again and give a task for each shard, in order; the report alone where it is finished already.

    Args:
        folder: where the shards are built.
        context: what else decides the bytes, for finding out whether a finished shard still fits.

    Raises:
        DataError: the source does not give what it gave at first.
    """
    digest, clips, left_out = hashlib.sha256(), list[Clip](), list[LeftOut]()
    shard = position = 0

    def task() -> ShardTask | ShardReport:
        file = shard_file(plan.name, shard, plan.num_shards)
        contents = hashlib.sha256(json.dumps([file, context, asdict(options.rows), options.tokenizer]).encode())
        for clip in clips:
            contents.update(_row_text(clip) + _audio_text(clip))
        contents.update(json.dumps([asdict(row) for row in left_out]).encode())
        made = ShardTask(
            folder / file,
            folder / report_file(plan.name, shard),
            contents.hexdigest(),
            plan.name,
            list(clips),
            None,
            list(left_out),
            options.rows,
        )
        if (report := finished_shard(made)) is not None:
            return report
        return made if count_tokens is None else replace(made, num_tokens=_count(count_tokens, clips))

    for number, row in enumerate(plan.rows()):
        digest.update(_row_text(row))
        size = row_bytes(row, options.rows)
        middle = position + size // 2
        while shard < min(plan.num_shards - 1, middle * plan.num_shards // plan.num_bytes):
            yield task()
            shard, clips, left_out = shard + 1, [], []
        position += size
        if (fault := _fault(row, plan.repeated.get(number))) is not None:
            name, audio = (row.name, "") if isinstance(row, RowFault) else (row.id, str(row.audio))
            left_out.append(LeftOut(fault[0], plan.name, name, audio, fault[1]))
        elif isinstance(row, Clip):
            clips.append(row)
    if digest.hexdigest() != plan.fingerprint:
        raise DataError(f"the source of split {plan.name!r} changed while it was read: start again")
    while shard < plan.num_shards:
        yield task()
        shard, clips, left_out = shard + 1, [], []


def _fault(row: Clip | RowFault, before: str | None) -> tuple[str, str] | None:
    """Reason and detail when a row is left out whatever its audio is; `before` is the row that has its id."""
    if isinstance(row, RowFault):
        return row.reason, str(row)
    if before is not None:
        return ID_TWICE, f"row {before} of the split, counted from 0, has this id"
    return text_fault(row)


def text_fault(clip: Clip) -> tuple[str, str] | None:
    """Reason and detail when a row's words cannot be used: there are none, or half of a character."""
    if not clip.text.strip() and not (clip.answer or "").strip() and clip.messages is None:
        return "without text", "its text is blank, and it has neither an answer nor messages"
    try:
        named = [clip.id, clip.text, clip.speaker, clip.licence, clip.answer, clip.language, dict(clip.columns)]
        json.dumps([named, [dict(turn) for turn in clip.messages or ()]], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return "not Unicode", f"it holds {error.object[error.start : error.end]!r}, half of a character"
    return None


def row_bytes(row: Clip | RowFault, options: RowOptions) -> int:
    """About how many bytes a row takes in a shard, by what it says; for original bytes, by their size."""
    if isinstance(row, RowFault):
        return MIN_ROW_BYTES
    recordings = [] if row.audio is NO_AUDIO else [(row.audio, row.duration), *row.more_audio]
    if options.keep_original:
        audio = sum(_size(audio) for audio, _ in recordings)
    else:
        audio = sum(math.ceil(min(s, options.max_seconds) * BYTES_PER_SECOND) for _, s in recordings)
    return max(MIN_ROW_BYTES, audio + 4 * len(row.text))


def _size(audio: Audio) -> int:
    try:
        return audio.stat().st_size if isinstance(audio, Path) else len(audio.read())
    except (OSError, AudioError):
        return 0  # whoever builds the shard says what is wrong with it


def _count(count_tokens: CountTokens, clips: list[Clip]) -> list[int]:
    counts = count_tokens([clip.text for clip in clips]) if clips else []
    if len(counts) != len(clips):
        raise DataError(f"the tokenizer counted {len(counts)} texts, expected {len(clips)}")
    return counts


def _row_text(row: Clip | RowFault) -> bytes:
    """A row but for its audio, as text."""
    if isinstance(row, RowFault):
        return json.dumps([row.reason, row.name]).encode()
    seconds = [row.duration, *(seconds for _, seconds in row.more_audio)]
    named = [row.id, row.text, row.speaker, row.licence, row.answer, row.language]
    messages = None if row.messages is None else [dict(turn) for turn in row.messages]
    everything: list[Any] = [named, seconds, dict(row.columns), messages, row.audio is NO_AUDIO]
    return json.dumps(everything, default=str).encode()


def _audio_text(clip: Clip) -> bytes:
    """What tells whether a row's recordings are those that they were: for files without reading them."""
    return json.dumps([_mark(audio) for audio in (clip.audio, *(audio for audio, _ in clip.more_audio))]).encode()


def _mark(audio: Audio) -> list[Any]:
    if isinstance(audio, AudioSegment):
        return [audio.start, audio.seconds, audio.channel, *_mark(audio.audio)]
    try:
        status = audio.stat() if isinstance(audio, Path) else None
    except OSError:
        status = None
    return [str(audio), *((status.st_size, status.st_mtime_ns) if status else ())]
