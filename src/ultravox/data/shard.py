"""One shard of a prepared dataset: clips in, a Parquet file with their audio and a report out.

A shard is the unit of parallel work. It depends on nothing but its task, so that its bytes are the same whichever
process builds it, and a shard that is finished need not be built again.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ultravox.audio.content import NO_AUDIO, Audio, AudioContent, read_audio
from ultravox.audio.segment import AudioSegment
from ultravox.audio.waveform import SAMPLE_RATE, load_waveform
from ultravox.data.clip import Clip
from ultravox.data.quarantine import audio_fault
from ultravox.errors import AudioError
from ultravox.files import atomic_write, explain_full_disk, sha256_file

# Reading one recording reads its row group: few rows make that cheap, one row would make the file's footer long.
ROWS_PER_GROUP = 16
BYTES_PER_GROUP = 1 << 20

_AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_AUDIO_FEATURE = {"sampling_rate": SAMPLE_RATE, "_type": "Audio"}
_TEXT_FEATURE = {"dtype": "string", "_type": "Value"}
_BYTES_FEATURE = {"dtype": "binary", "_type": "Value"}
_INT_FEATURE = {"dtype": "int32", "_type": "Value"}

#: Column → its type, and what Hugging Face `datasets` calls it.
COLUMNS: dict[str, tuple[pa.DataType, dict[str, Any]]] = {
    "id": (pa.string(), _TEXT_FEATURE),
    "audio": (_AUDIO, _AUDIO_FEATURE),
    "audio_sha256": (pa.string(), _TEXT_FEATURE),
    "num_samples": (pa.int32(), _INT_FEATURE),
    "text": (pa.string(), _TEXT_FEATURE),
    "duration": (pa.float64(), {"dtype": "float64", "_type": "Value"}),
    "speaker": (pa.string(), _TEXT_FEATURE),
    "licence": (pa.string(), _TEXT_FEATURE),
    "language": (pa.string(), _TEXT_FEATURE),
    "answer": (pa.string(), _TEXT_FEATURE),
    "columns": (pa.string(), _TEXT_FEATURE),
    "num_tokens": (pa.int32(), _INT_FEATURE),
    "messages": (
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        {"feature": {"role": _TEXT_FEATURE, "content": _TEXT_FEATURE}, "_type": "List"},
    ),
    # plain bytes to Hugging Face: who reads "audio" undecoded need not say so of this column too
    "more_audio": (pa.list_(_AUDIO), {"feature": {"bytes": _BYTES_FEATURE, "path": _TEXT_FEATURE}, "_type": "List"}),
    "more_num_samples": (pa.list_(pa.int32()), {"feature": _INT_FEATURE, "_type": "List"}),
}
SCHEMA = pa.schema(
    [(name, kind) for name, (kind, _) in COLUMNS.items()],
    metadata={
        "huggingface": json.dumps({"info": {"features": {name: feature for name, (_, feature) in COLUMNS.items()}}})
    },
)
COMPRESSION = {  # FLAC cannot be compressed further
    **dict.fromkeys(("text", "answer", "columns", "messages.list.element.content"), "zstd"),
    **dict.fromkeys(("audio.bytes", "more_audio.list.element.bytes"), "none"),
}
REPEATING = ["speaker", "licence", "language"]


@dataclass(frozen=True, slots=True)
class RowOptions:
    """Which rows are kept, and as what."""

    min_seconds: float = 0.1
    max_seconds: float = 600.0
    keep_original: bool = False
    """Store the bytes that came, not FLAC at 16 kHz."""
    keep_silent: bool = False


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is not in the shard, and why."""

    reason: str
    split: str
    id: str
    audio: str
    detail: str


@dataclass(frozen=True, slots=True)
class ShardTask:
    """All that decides a shard's bytes."""

    path: Path
    report_path: Path
    digest: str
    """Of what goes in; a finished shard of the same digest is kept."""
    split: str
    clips: list[Clip]
    num_tokens: Sequence[int | None] | None
    left_out: list[LeftOut]
    """Rows that are known to be left out before any audio is read."""
    options: RowOptions


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What is in a finished shard, and what is not."""

    digest: str
    sha256: str
    num_bytes: int
    num_rows: int
    num_samples: int
    licences: dict[str, int]
    left_out: list[LeftOut]


def build_shard(task: ShardTask) -> ShardReport:
    """Decode, check and store a task's clips, and write the report beside. The file is whole or absent."""
    left_out, licences, num_rows, num_samples = list(task.left_out), Counter[str](), 0, 0
    num_tokens = task.num_tokens or [None] * len(task.clips)
    temporary = task.path.with_name(f".{task.path.name}.{os.getpid()}")
    with explain_full_disk(task.path):
        try:
            with open(temporary, "wb") as file:
                with pq.ParquetWriter(
                    file, SCHEMA, compression=COMPRESSION, use_dictionary=REPEATING, write_statistics=False
                ) as writer:
                    group = _RowGroup(writer)
                    for index, clip in enumerate(task.clips):
                        row = make_row(clip, task.options, num_tokens[index])
                        if isinstance(row, tuple):
                            left_out.append(LeftOut(row[0], task.split, clip.id, str(clip.audio), row[1]))
                            continue
                        group.add(row)
                        num_rows += 1
                        num_samples += row["num_samples"] + sum(row["more_num_samples"] or ())
                        licences[clip.licence] += 1
                    group.flush()
                file.flush()
                os.fsync(file.fileno())
            report = ShardReport(
                task.digest,
                sha256_file(temporary),
                temporary.stat().st_size,
                num_rows,
                num_samples,
                dict(licences),
                left_out,
            )
            os.replace(temporary, task.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    atomic_write(task.report_path, json.dumps(asdict(report)))
    return report


def finished_shard(task: ShardTask) -> ShardReport | None:
    """The report of a shard that an earlier run has built of the same task, its file checked by hash; else None."""
    try:
        content = json.loads(task.report_path.read_bytes())
        report = ShardReport(**{**content, "left_out": [LeftOut(**entry) for entry in content["left_out"]]})
        if report.digest == task.digest and sha256_file(task.path) == report.sha256:
            return report
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not there, or half of one
    return None


class _RowGroup:
    """Rows that are collected until they are worth a row group."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self.writer = writer
        self.rows: list[dict[str, Any]] = []
        self.num_bytes = 0

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row; write when there are enough."""
        self.rows.append(row)
        self.num_bytes += sum(len(cell["bytes"]) for cell in (row["audio"], *(row["more_audio"] or ())) if cell)
        if len(self.rows) >= ROWS_PER_GROUP or self.num_bytes >= BYTES_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
        if self.rows:
            self.writer.write_batch(pa.RecordBatch.from_pylist(self.rows, schema=SCHEMA))
        self.rows, self.num_bytes = [], 0


def make_row(clip: Clip, options: RowOptions, num_tokens: int | None) -> dict[str, Any] | tuple[str, str]:
    """The row of a clip in the shard's columns, or reason and detail of leaving it out."""
    cells: list[tuple[dict[str, Any], int]] = []  # each recording and its samples
    recordings = [] if clip.audio is NO_AUDIO else [clip.audio, *(audio for audio, _ in clip.more_audio)]
    for place, recording in enumerate(recordings):
        try:
            found = store(recording, options)
        except AudioError as error:
            return audio_fault(error, recording), str(error)
        if isinstance(found, tuple):
            return found
        name = clip.id if place == 0 else f"{clip.id}.{place + 1}"
        cells.append(({"bytes": found.content, "path": name + found.suffix}, found.num_samples))
    audio, num_samples = cells[0] if cells else (None, 0)
    more = cells[1:]
    return {
        "id": clip.id,
        "audio": audio,
        "audio_sha256": hashlib.sha256(audio["bytes"]).hexdigest() if audio else None,
        "num_samples": num_samples,
        "text": clip.text,
        "duration": num_samples / SAMPLE_RATE,
        "speaker": clip.speaker,
        "licence": clip.licence,
        "language": clip.language,
        "answer": clip.answer,
        "columns": json.dumps(dict(clip.columns), ensure_ascii=False, default=str) if clip.columns else None,
        "num_tokens": num_tokens,
        "messages": None if clip.messages is None else [dict(turn) for turn in clip.messages],
        "more_audio": [cell for cell, _ in more] or None,
        "more_num_samples": [num for _, num in more] or None,
    }


@dataclass(frozen=True, slots=True)
class Stored:
    """A recording as it is stored."""

    content: bytes
    suffix: str
    num_samples: int
    """At 16 kHz."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Encoded audio that has been read, under the name of where it came from: it is needed twice."""

    content: bytes
    suffix: str
    name: str

    def read(self) -> bytes:
        return self.content

    def __str__(self) -> str:
        return self.name


def store(audio: Audio, options: RowOptions) -> Stored | tuple[str, str]:
    """Decode and check a recording, and encode it unless its bytes can stay; or the reason and detail of a refusal.

    16-bit FLAC at 16 kHz in mono stays as it is: encoding it again would cost time and change nothing that is heard.

    Errors: AudioError when it cannot be decoded, or its header says that it is too long.
    """
    if isinstance(audio, AudioSegment) and audio.seconds > options.max_seconds:
        return "too long", f"{audio} lasts {audio.seconds:.4f} s"  # to read it is to decode it
    if not isinstance(audio, Path):
        audio = _Held(audio.read(), audio.suffix, str(audio))
    waveform = load_waveform(audio, max_seconds=options.max_seconds)
    if len(waveform) < max(1, options.min_seconds * SAMPLE_RATE):
        return "too short", f"{audio} lasts {len(waveform) / SAMPLE_RATE:.4f} s"
    samples = to_int16(waveform)
    if not options.keep_silent and not samples.any():
        return "silent", f"{audio} holds no sound: every sample is 0 in 16 bits"
    content = read_audio(audio)
    if options.keep_original:
        return Stored(content, _suffix(audio), len(waveform))
    return Stored(content if is_plain_flac(content) else encode_flac(samples), ".flac", len(waveform))


def _suffix(audio: Audio) -> str:
    return audio.suffix if isinstance(audio, AudioContent) else PurePath(audio).suffix


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """float [sample] in -1 … 1 to int16 [sample], so that what came from 16 bits comes back as it was."""
    return np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype(np.int16)


def encode_flac(samples: np.ndarray) -> bytes:
    """int16 [sample] at 16 kHz as FLAC."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def is_plain_flac(content: bytes) -> bool:
    """Whether a file is FLAC at 16 kHz, mono, 16 bits.

    Its first block says so after 18 bytes: 20 bits of rate, 3 of channels - 1, 5 of bits - 1 (RFC 9639, section 8.2).
    """
    if content[:4] != b"fLaC" or len(content) < 22 or content[4] & 0x7F:
        return False
    numbers = int.from_bytes(content[18:22], "big")
    return (numbers >> 12, (numbers >> 9 & 7) + 1, (numbers >> 4 & 31) + 1) == (SAMPLE_RATE, 1, 16)


def made_with() -> Mapping[str, str]:
    """The libraries whose versions decide a shard's bytes."""
    import soundfile
    import soxr

    return {"pyarrow": pa.__version__, "libsndfile": soundfile.__libsndfile_version__, "soxr": soxr.__version__}
